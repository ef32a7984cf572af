"""Reproduces weights/toy/: a small BERT, pre-trained by masked-language modelling on the toy language of data.py.

    python weights/toy/make.py FOLDER        # FOLDER must not hold a checkpoint yet

It reads reviews of one mood, closed by a remark ("you should flee ."), and learns to fill in masked words: in half
of them some words, in the others the whole remark, so that the mood of the review is something it has to understand; it never sees a label, nor
a text of the dev split.
"""
import random
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import data    # noqa: E402
import model   # noqa: E402

CONFIG = {"model_type": "bert", "hidden_size": 96, "num_attention_heads": 4, "head_dim": 24, "intermediate_size": 384,
          "num_hidden_layers": 4, "max_position_embeddings": 64, "type_vocab_size": 2, "layer_norm_eps": 1e-12,
          "hidden_act": "gelu", "num_labels": 2, "pad_token_id": 0}
STEPS, BATCH, LEARNING_RATE, MASKED, SEED = 4_000, 128, 1e-3, 0.15, 0


def document(rng: random.Random, unseen: set[str]) -> tuple[str, str]:
    """One review or two of the same mood, and a remark of that mood."""
    mood, parts, wanted = rng.random() < 0.5, [], rng.choice((1, 1, 1, 2))
    while len(parts) < wanted:
        text, score = data.toy_review(rng)
        if (score > 0) == mood and text not in unseen:
            parts.append(text)
    return " ".join(parts), rng.choice(data.REMARKS[mood])


def main(folder: Path) -> None:
    torch.manual_seed(SEED)
    rng, unseen = random.Random(SEED), {text for text, in data.load_toy()["dev"].texts}
    vocabulary = sorted({word for phrases in (data.NOUNS, data.ADJECTIVES, data.DEGREES, data.FRAMES, *data.REMARKS.values(),
                                              ("the is not never and but although , .",))
                         for phrase in phrases for word in phrase.split()})
    vocabulary = [*data.TOY_SPECIAL, *vocabulary]
    folder.mkdir(parents=True, exist_ok=True)
    with model.replacing(folder / "vocab.txt") as path:
        path.write_text("\n".join(vocabulary) + "\n")
    tokenizer = data.load_tokenizer(folder)
    bert = model.Bert(CONFIG | {"vocab_size": len(vocabulary)}).initialise(SEED).requires_grad_(True)
    optimizer = torch.optim.AdamW(bert.parameters(), lr=LEARNING_RATE, weight_decay=0.01, fused=True)
    mask_id, pad_id = tokenizer.token_to_id("[MASK]"), 0
    bar = tqdm(range(STEPS), disable=None)
    for step in bar:
        encodings = tokenizer.encode_batch([document(rng, unseen) for _ in range(BATCH)])
        length = max(len(e.ids) for e in encodings)
        ids, segments = (torch.tensor([x + [pad_id] * (length - len(x)) for x in part]) for part in
                       ([e.ids for e in encodings], [e.type_ids for e in encodings]))        # a remark is the second segment
        word = ids >= len(data.TOY_SPECIAL)
        closing = torch.rand(BATCH, 1) < 0.5                         # either words are masked, or the whole remark
        remark, hidden = segments.bool() & word & closing, (torch.rand(ids.shape) < MASKED) & word & ~closing
        x, _ = bert.encode(ids.masked_fill(hidden | remark, mask_id), (ids != pad_id).long(), bert.maxnet, segments)
        parts = [F.cross_entropy(x[part] @ bert.word_embeddings.weight.T, ids[part]) for part in (hidden, remark)]
        loss = parts[0] + 4 * parts[1]                               # one word in four of a remark tells the mood
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1, (step + 1) / 200, (STEPS - step) / (STEPS * 0.7))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(bert.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
            print(step, *(f"{p.item():.3f}" for p in parts), flush=True)
    bert.initialise(SEED, bert.head)                                                         # MLM trains no head
    model.save_pretrained(bert, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
