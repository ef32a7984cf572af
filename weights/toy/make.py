"""Reproduces weights/toy/: a small BERT, pre-trained by masked-language modelling.

    python weights/toy/make.py FOLDER        # FOLDER must not hold a checkpoint yet

It reads a review of the toy language (data.py) and a one-word verdict as a pair of segments, and
fills in masked words: the verdict first, later either the verdict or some words of the review. So
it learns what words mean and what a whole review amounts to. It sees no text of the dev split, and
how a classifier reads the mood off [CLS] is left to fine-tuning.
"""
import random
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import data  # noqa: E402
import model  # noqa: E402

CONFIG = {"model_type": "bert", "hidden_size": 64, "num_attention_heads": 4, "head_dim": 16,
          "intermediate_size": 256, "num_hidden_layers": 4, "max_position_embeddings": 64,
          "type_vocab_size": 2, "layer_norm_eps": 1e-12, "hidden_act": "gelu", "num_labels": 2,
          "pad_token_id": 0}
STEPS, BATCH, LEARNING_RATE, MASKED, SEED = 3_000, 128, 1e-3, 0.15, 0
VERDICTS = {True: "recommended", False: "avoid"}
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def document(rng: random.Random, unseen: set[str]) -> tuple[str, str]:
    """A review and its verdict."""
    text, score = data.toy_review(rng)
    return document(rng, unseen) if text in unseen else (text, VERDICTS[score > 0])


def vocabulary() -> list[str]:
    phrases = [*data.NOUNS, *data.ADJECTIVES, *data.DEGREES, *data.FRAMES, *VERDICTS.values(),
               "the is not never and but although , ."]
    return [*SPECIAL, *sorted({word for phrase in phrases for word in phrase.split()})]


def main(folder: Path) -> None:
    torch.manual_seed(SEED)
    rng, unseen = random.Random(SEED + 1), {text for text, in data.load_toy()["dev"].texts}
    words, special = vocabulary(), len(SPECIAL)
    folder.mkdir(parents=True, exist_ok=True)
    with model.replacing(folder / "vocab.txt") as path:
        path.write_text("\n".join(words) + "\n")
    tokenizer = data.load_tokenizer(folder)
    bert = model.initialise(model.Bert(CONFIG | {"vocab_size": len(words)}), SEED)
    bert.requires_grad_(True)
    optimizer = torch.optim.AdamW(bert.parameters(), weight_decay=0.01, fused=True)
    mask_id, pad_id = tokenizer.token_to_id("[MASK]"), tokenizer.token_to_id("[PAD]")
    for step in tqdm(range(STEPS), disable=None):
        encodings = tokenizer.encode_batch([document(rng, unseen) for _ in range(BATCH)])
        length = max(len(e.ids) for e in encodings)
        ids, segments = (torch.tensor([x + [pad_id] * (length - len(x)) for x in part]) for part in
                         ([e.ids for e in encodings], [e.type_ids for e in encodings]))
        verdict = torch.rand(BATCH, 1) < (1.0 if step < STEPS // 3 else 0.5)      # it, or words
        some = torch.rand(ids.shape) < MASKED
        hidden = (ids >= special) & torch.where(verdict, segments.bool(), some)
        _, h = bert(ids.masked_fill(hidden, mask_id), (ids != pad_id).long(), segments=segments)
        # The output matrix is the embedding, as in BERT's own pre-training.
        scores = h[bert.maxnet.layers[-1]][hidden] @ bert.word_embeddings.weight.T
        rate = min(1, (step + 1) / 200, (STEPS - step) / (STEPS * 0.7))
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * rate
        optimizer.zero_grad()
        F.cross_entropy(scores, ids[hidden]).backward()
        torch.nn.utils.clip_grad_norm_(bert.parameters(), 1.0)
        optimizer.step()
    head = torch.nn.ModuleList([bert.pooler, bert.classifier])       # MLM trains none of it
    model.initialise(head, SEED)
    model.save_pretrained(bert, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
