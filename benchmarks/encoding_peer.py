"""How long does sentence-transformers take? Answers `encoding.py` on stdin and stdout, under a Python that has it.

A first line is the texts, as JSON; each line after asks for them to be encoded with the defaults of `encode`.
Imports nothing of ours.
"""

import json
import os
import sys
import time

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import sentence_transformers  # pyright: ignore[reportMissingImports]
import torch


def main() -> None:
    location, max_tokens, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(threads)
    texts = json.loads(sys.stdin.readline())
    model = sentence_transformers.SentenceTransformer(location, device="cpu")
    model.max_seq_length = max_tokens
    print(json.dumps({"version": sentence_transformers.__version__}), flush=True)
    for _ in sys.stdin:
        cpu_s, wall_s = time.process_time(), time.perf_counter()
        model.encode(texts, show_progress_bar=False)
        print(json.dumps({"cpu_s": time.process_time() - cpu_s, "wall_s": time.perf_counter() - wall_s}), flush=True)


if __name__ == "__main__":
    main()
