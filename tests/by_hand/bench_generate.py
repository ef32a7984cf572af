"""Tokens per second of greedy generation, ours against the transformers library's, in one run.

    pip install transformers==5.23.0 && python tests/by_hand/bench_generate.py weights/smollm2-135m

Both in bfloat16, with a cache, the same prompts and number of tokens; the two take turns, the best
of three counts for each. Not a test: run it by hand on a quiet machine.
"""
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import data  # noqa: E402
import evaluate  # noqa: E402
from model import load_pretrained  # noqa: E402

NEW, PROMPT = 64, "def fibonacci(n: int) -> int:\n    "


def main(folder: str) -> None:
    from transformers import AutoModelForCausalLM  # the library to compare with, not needed by us
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    ours = load_pretrained(folder, dtype=torch.bfloat16)
    tokenizer = data.load_tokenizer(folder)
    ids = torch.tensor([tokenizer.encode(PROMPT).ids])
    end = data.end_of_text(tokenizer)[0]
    print(f"{torch.get_num_threads()} threads, {NEW} tokens, torch {torch.__version__}")

    def run_theirs(batch: int) -> int:
        rows = ids.expand(batch, -1)
        out = theirs.generate(rows, attention_mask=torch.ones_like(rows),
                              max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False,
                              pad_token_id=end)
        return batch * (out.size(1) - ids.size(1))

    def run_ours(batch: int) -> int:
        texts = evaluate.generate(ours, tokenizer, [PROMPT] * batch, NEW)
        return sum(len(tokenizer.encode(text).ids) for text in texts)

    for batch in (1, 16):
        best = {}
        for _ in range(3):
            for name, run in (("transformers", run_theirs), ("ours", run_ours)):
                start = time.perf_counter()
                tokens = run(batch)
                best[name] = max(best.get(name, 0), tokens / (time.perf_counter() - start))
        ratio = best["ours"] / best["transformers"]
        print(f"batch {batch:2}: " + ", ".join(f"{n} {v:.0f} tokens/s" for n, v in best.items())
              + f"; ratio {ratio:.2f}", flush=True)


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        sys.exit(__doc__)
    main(sys.argv[1])
