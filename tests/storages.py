"""Memory around a tensor of which it is a part."""


def same_storage(tensors):
    """Copies that keep strides and what lies between the elements."""
    copies = []
    for tensor in tensors:
        whole = tensor._base if tensor._base is not None else tensor
        copies.append(whole.clone().as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()))
    return copies


def storage_of(tensor):
    return tensor._base if tensor._base is not None else tensor
