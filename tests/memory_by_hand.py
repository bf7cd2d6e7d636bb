"""What tests do with a memory manager by hand, and what they see of it."""

from torch_paged.memory import history

PROMPT = list(range(1, 11))  # 10 tokens: two full blocks of 4, and half of a third


def snapshot(manager):
    """Everything that a step must leave as it was when it fails or is rolled back."""
    s = manager.sequences
    arrays = [s.handle, s.length, s.committed, s.known, s.num_blocks, s.outside]
    for group in manager.groups:
        pool = group.pool
        arrays += [group.table, group.first, group.cached.node, pool.refcount]
        arrays += [pool.free_blocks, pool.waiting_blocks, pool.evictable_blocks]
    return [array.tolist() for array in arrays] + [list(manager.steps)]


def run(manager, tokens, namespace=None):
    """A new sequence that holds these tokens, told to the prefix cache."""
    seq = manager.add(tokens, namespace)
    extend(manager, seq, tokens[manager.length(seq) :])
    return seq


def extend(manager, seq, tokens, told=True):
    step = manager.prepare([seq], [len(tokens)])
    manager.commit(step)
    if told:
        history.remember(manager, step, tokens)


def found(manager, tokens, namespace=None):
    """How many of these tokens a new sequence would find."""
    seq = manager.add(tokens, namespace)
    length = manager.length(seq)
    manager.free(seq)
    return length


def table(manager, seq):
    s = manager.sequences
    row = s.find_one(seq)
    return manager.groups[0].table[row, : s.num_blocks[row]].tolist()


def filled(manager, *lengths):
    """New sequences of these lengths, committed."""
    seqs = [manager.add() for _ in lengths]
    manager.commit(manager.prepare(seqs, lengths))
    return seqs
