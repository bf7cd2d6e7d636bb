"""Beam search with beams forked and dropped in every step: `python examples/beam_search.py`.

A fork shares all blocks, and a step copies only the half-full ones that several beams are about to write to.
"""

import argparse

from demo import build, decode
from terminal import positive
from torch_paged.serving import beam_search

PROMPT = "import os\nimport sys\n\ndef main(argv):\n    if len(argv) "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--beams", default=4, type=positive)
    parser.add_argument("--new-tokens", default=24, type=positive)
    args = parser.parse_args()

    cache, model = build(num_blocks=128, max_seqs=args.beams)
    prompt = list(PROMPT.encode())
    print(PROMPT)
    for width in sorted({1, args.beams}):  # width 1 is greedy
        print(f"--- {width} beams: sum of log-probabilities, text")
        beams = beam_search(cache, model, prompt, num_beams=width, max_new_tokens=args.new_tokens, length_penalty=0)
        for beam in beams:
            print(f"{beam.score:8.3f}  {decode(beam.tokens)!r}")
    assert cache.num_free_blocks == cache.num_blocks  # nothing of it is left


if __name__ == "__main__":
    main()
