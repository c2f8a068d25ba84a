"""Distil the text encoder into a smaller student that makes nearly the same vectors: the `recloop distill` command.

In:  the texts of a catalogue, an encoder, tuned or not.  Out: a model folder, for `encoder.model`, and its figures.
Knows nothing of users or versions.

    texts, and pieces of them ─▶ teacher ─▶ vectors ◀─ 1 − cosine, and how texts are alike ─ student ◀─ the same texts

A student has fewer of the teacher's layers, or fewer neurons in each (Sanh et al., 2019; Reimers and Gurevych, 2020).
Pieces of texts, in another order, make of a small catalogue enough to learn from. The best epoch by texts held out is
kept. One process, without Ray: a student of one layer learns thousands of texts a minute.

Shapes: B texts together, E encoder dimension.
"""

import argparse
import copy
import json
import math
import random
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from cluster.config import Recipe, load_recipe
from cluster.dataset import load_dataset
from cluster.errors import DataError
from cluster.home import Home
from cluster.progress import progress
from embeddings.encoders.batching import batches_by_length, pad, pool
from embeddings.encoders.pretrained import load_model, load_tokenizer
from embeddings.encoders.tokens import Reader
from embeddings.text_encoder import EncoderConfig, TextEncoder
from training.encoder.config import StudentConfig
from training.run import new_run

MODEL, RUN_FILE = "model", "distill.json"
LEAST_TEXTS = 10
POOLED, PROMPTS_FILE = ("mean_tokens", "cls_token", "lasttoken"), "config_sentence_transformers.json"
"""How a model folder says what its vectors are, and what they are asked with."""
NEIGHBOURS = 10
COMPARED = 2_000
"""Held-out texts whose neighbours are compared."""
WARM_UP = 0.05
"""Share of the steps over which the rate rises."""
PIECES = re.compile(r"(?<=[.,;:!?。，；：！？])\s*")
"""Between pieces of a text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DistilledRun:
    """What distillation leaves behind; written as distill.json in its folder."""

    model: str
    """Folder of the student, for `encoder.model`."""
    teacher_fingerprint: str
    metrics: dict[str, float]
    """Of texts held out: mean cosine to the teacher's vectors, and how many of each one's ten neighbours are the same;
    parameters of both, seconds."""


def run(args: argparse.Namespace) -> dict[str, Any]:  # Any: JSON
    """Distil over a dataset's texts."""
    recipe = load_recipe(args.recipe, args.overrides)
    texts = load_dataset(args.data or args.home.default_dataset).items()["text"].to_pylist()
    if args.texts is not None:
        try:
            texts += Path(args.texts).read_text("utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise DataError(f"--texts {args.texts}: cannot be read ({error})") from error
    return asdict(distill(recipe, texts, args.home.ensure()))


def distill(recipe: Recipe, texts: Sequence[str], home: Home) -> DistilledRun:
    """Distil the recipe's encoder.

    Raises `DataError` for too few texts, `ConfigError` for a student that the model cannot become.
    """
    config, teacher = recipe.section(StudentConfig), TextEncoder(recipe.section(EncoderConfig), home.cache)
    told = list(dict.fromkeys(text for text in texts if text))
    if len(told) < LEAST_TEXTS:
        raise DataError(f"{len(told)} texts: a student learns from {LEAST_TEXTS} or more")
    started_s, generator = time.monotonic(), random.Random(config.seed)
    generator.shuffle(told)
    held_out = max(2, int(len(told) * config.validation_fraction))
    learned = [*told[held_out:], *_fragments(told[held_out:], config.fragments, generator)]
    student = _Student(teacher, config)
    given = [torch.from_numpy(teacher.encode(part)) for part in (learned, told[:held_out])]
    best = student.learn(learned, given[0], told[:held_out], given[1])
    folder = new_run(home, recipe, "distill")
    student.save(folder / MODEL)
    distilled = DistilledRun(
        model=str(folder / MODEL),
        teacher_fingerprint=teacher.fingerprint,
        metrics=best | {"distill_s": time.monotonic() - started_s},
    )
    (folder / RUN_FILE).write_text(json.dumps(asdict(distilled), indent=1))
    return distilled


def _fragments(texts: Sequence[str], count: int, generator: random.Random) -> Iterator[str]:
    """Yield texts made of some of each text's pieces."""
    for text in texts:
        pieces = [piece for piece in PIECES.split(text) if piece]
        for _ in range(count if pieces else 0):
            yield " ".join(generator.sample(pieces, generator.randint(1, len(pieces))))


class _Student:
    """A smaller model on its way to the teacher's vectors."""

    def __init__(self, teacher: TextEncoder, config: StudentConfig) -> None:
        own = teacher.config
        whole = load_model(teacher.location, own.layers, own.neurons)
        if teacher.adapter is not None:
            teacher.adapter.apply(whole)
        with tempfile.TemporaryDirectory() as scratch:  # read back as a model of the teacher's own size would be
            whole.save_pretrained(scratch)
            self.model = load_model(scratch, config.layers, None if config.neurons == 1 else config.neurons)
        self._sizes = {"teacher_parameters": _count(whole), "student_parameters": _count(self.model)}
        self._tokenizer = load_tokenizer(own.model, teacher.location)
        self._reader = Reader(self._tokenizer, own.max_tokens)
        self._traits, self._config, self._location = teacher.traits, config, teacher.location

    def learn(
        self, texts: Sequence[str], given_NE: torch.Tensor, held_out: Sequence[str], wanted_ME: torch.Tensor
    ) -> dict[str, float]:
        """Learn, keep the best epoch, and return its figures."""
        config, ids, held_out_ids = self._config, self._read(texts), self._read(held_out)
        torch.manual_seed(config.seed)
        generator = np.random.default_rng(config.seed)
        batches = list(self._batches(ids))
        optimiser = torch.optim.AdamW(
            self.model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        steps = len(batches) * config.epochs
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _rate(step, steps))
        best, weights = self._compare(held_out_ids, wanted_ME), copy.deepcopy(self.model.state_dict())
        with progress(config.epochs, "distilling", unit="epoch") as bar:
            for _ in range(config.epochs):
                self.model.train()
                for n in generator.permutation(len(batches)):
                    with torch.autocast("cpu", torch.bfloat16, enabled=config.bfloat16):
                        vector_BE = self._vectors([ids[i] for i in batches[n]])
                    given_BE = given_NE[batches[n]]
                    alike_BB = vector_BE @ vector_BE.T - given_BE @ given_BE.T
                    loss = (1 - (vector_BE * given_BE).sum(1)).mean() + alike_BB.square().mean()
                    optimiser.zero_grad()
                    loss.backward()
                    nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_norm)
                    optimiser.step()
                    schedule.step()
                found = self._compare(held_out_ids, wanted_ME)
                bar.update(1)
                if found["cosine"] > best["cosine"]:
                    best, weights = found, copy.deepcopy(self.model.state_dict())
        self.model.load_state_dict(weights)
        return best | self._sizes

    def save(self, folder: Path) -> None:
        """Write a model folder that says how it is to be asked."""
        self.model.save_pretrained(folder)
        self._tokenizer.save_pretrained(folder)
        pooling = {f"pooling_mode_{name}": name.startswith(self._traits.pooling) for name in POOLED}
        prompts = {"query": self._traits.query_prefix, "passage": self._traits.item_prefix}
        for name, said in (("1_Pooling/config.json", pooling), (PROMPTS_FILE, {"prompts": prompts})):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(json.dumps(said, indent=1))

    def _read(self, texts: Sequence[str]) -> list[Sequence[int]]:
        prefix = self._traits.item_prefix
        return [tokens.ids or [self._reader.pad_id] for tokens in self._reader.read([prefix + text for text in texts])]

    def _batches(self, ids: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        config = self._config
        return batches_by_length(
            [len(one) for one in ids], max_tokens=config.batch_tokens, max_texts=config.batch_texts
        )

    def _vectors(self, ids: Sequence[Sequence[int]]) -> torch.Tensor:
        ids_BL, mask_BL = pad(ids, self._reader.pad_id)
        hidden_BLE = self.model(input_ids=ids_BL, attention_mask=mask_BL).last_hidden_state
        return pool(hidden_BLE, mask_BL, self._traits.pooling)

    @torch.inference_mode()
    def _compare(self, ids: Sequence[Sequence[int]], wanted_ME: torch.Tensor) -> dict[str, float]:
        """Return the mean cosine to the teacher's vectors, and how many of each text's neighbours are the same."""
        self.model.eval()
        found_ME = torch.empty_like(wanted_ME)
        for batch in self._batches(ids):
            found_ME[batch] = self._vectors([ids[i] for i in batch])
        some = [vectors[:COMPARED] for vectors in (found_ME, wanted_ME)]
        count = min(NEIGHBOURS, len(some[0]) - 1)
        same = [set(a) & set(b) for a, b in zip(*(_neighbours(v, count) for v in some), strict=True)]
        recall = float(np.mean([len(both) / count for both in same]))
        return {"cosine": float((found_ME * wanted_ME).sum(1).mean()), "neighbours": recall}


def _neighbours(vector_ME: torch.Tensor, count: int) -> list[list[int]]:
    """Return the rows nearest to each, without itself."""
    return (vector_ME @ vector_ME.T).fill_diagonal_(-2).topk(count).indices.tolist()


def _rate(step: int, steps: int) -> float:
    """Return the share of the learning rate at a step."""
    return min(1.0, (step + 1) / (WARM_UP * steps)) * 0.5 * (1 + math.cos(math.pi * step / steps))


def _count(model: nn.Module) -> float:
    return float(sum(weight.numel() for weight in model.parameters()))
