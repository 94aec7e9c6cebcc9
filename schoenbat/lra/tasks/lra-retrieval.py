"""Does one paper cite the other? Pairs from the ACL Anthology Network, read byte by byte (Radev et al. 2013).

The Long Range Arena (Tay et al. 2021) published its pairs with their texts, in one large archive. Where that cannot be
had, pairs are built from a mirror's full-text papers and the citation network; that smaller data set is called
"AAN subset" wherever it is shown.
"""

import csv
import io
import json
import lzma
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np

from schoenbat.errors import UserError, shorten
from schoenbat.lra.data.arrays import SPLITS, write_dataset
from schoenbat.lra.data.fetch import RemoteFile, fetch
from schoenbat.lra.data.subset import balanced_rows, check_size
from schoenbat.lra.tasks import MAX_LENGTH, Progress, Task, byte_tokens
from schoenbat.registry import check_bounds

ARCHIVE = RemoteFile(
    mirror_path="lra/lra_release.gz",
    urls=("https://storage.googleapis.com/long-range-arena/lra_release.gz",),
    size=7_700_000_000,
    size_is_exact=False,
    checksum=None,
    is_gzip=True,
)
"""The Long Range Arena's release; only tsv_data/new_aan_pairs.{train,eval,test}.tsv are read."""
DOCS = RemoteFile(
    mirror_path="aan/aan_docs.jsonl.xz",
    urls=(),
    size=12_623_548,
    checksum="sha256:dfd35c0297abcec0f534965fbf38af6a8bccdee1686d80c0dc55f786eca7ddf9",
)
"""One JSON object a line: id, year, title, text (and more)."""
EDGES = RemoteFile(
    mirror_path="aan/aan_edges_within.tsv",
    urls=(),
    size=198_535,
    checksum="sha256:55cbea8fe50048cf39bf31f046728feca372aba3bcf7d7ed8b6d847a5b6a6e4a",
)
"""`citing TAB cited`, below one header line; both papers are among DOCS."""
NETWORK = RemoteFile(
    mirror_path="aan/acl.txt.xz",
    urls=(),
    size=207_832,
    checksum="sha256:1c48689d43ab929c7777a75af8a3c3710295d29eece8937137c61f3ca36d7254",
)
"""`citing , cited`: every citation known, used to tell that two papers are not linked."""
LAST_TRAIN_YEAR, DEV_YEAR = 2009, 2010
_LABELS = {"0": 0, "0.0": 0, "1": 1, "1.0": 1}
MOST_TEXT, MOST_TEXTS = 2**26, 2**34
"""Bytes of one text of the release, and of all of them, which are held in memory: far more than papers have."""


@dataclass
class Pairs:
    """Texts, each once, and for each split the pairs of text indices and their labels."""

    texts: list[bytes]
    pairs: dict[str, list[tuple[int, int]]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    labels: dict[str, list[int]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    notes: list[str] = field(default_factory=list)

    def add(self, split: str, pair: tuple[int, int], label: int) -> None:
        self.pairs[split].append(pair)
        self.labels[split].append(label)


class Retrieval(Task):
    """Is there a citation between two papers (1) or not (0)?

    Two texts make an example. Each byte plus 1 is a token, so that 0 stays free for padding:

        column   0    1    2    3   ...        0    1    2    3   ...   label
        text     P    a    r    s   ...   and  T    r    e    e   ...
        token    81   98   115  116 ...        85   115  102  102 ...   1

    From the archive the pairs are those of the Long Range Arena. From a mirror's papers (title, newline, text) they
    are built so: a positive is a citation, its direction ignored; its negative is the citing paper with another one,
    drawn from the list of cited papers (so a paper is drawn as often as it is cited), no later than the citing paper
    and not linked to it in the whole network. Drawing both partners from cited papers matters, because the style of a
    file alone would tell much about whether a paper is ever cited. Papers that cite up to 2009 give train, 2010 dev,
    2011 and later test.

    No pair occurs in two splits, in neither order, though papers do (the cited ones above all). Pairs of the archive
    with an empty text are left out.
    `train_size`, `dev_size`, `test_size` draw a subset, half of each label.
    """

    num_classes = 2
    vocab_size = 257
    num_texts = 2
    class_names = ("unrelated", "one cites the other")
    how_to_get = (
        "put the aan/ files (a subset) or lra/lra_release.gz into a folder and name that folder in "
        "SCHOENBAT_DATA_MIRROR, or set data.download_limit_mb to 8500 to download the Long Range Arena's archive"
    )

    @dataclass(frozen=True)
    class Config:
        max_length: int = 4000
        train_size: int | None = None
        dev_size: int | None = None
        test_size: int | None = None
        seed: int = 0

        def __post_init__(self) -> None:
            check_bounds(self, max_length=(1, MAX_LENGTH))
            for split in SPLITS:
                check_size(f"{split}_size", getattr(self, f"{split}_size"))
            if self.seed < 0:
                raise ValueError(f"seed must not be negative, but is {self.seed}")

    config: Config

    def download(
        self, folder: Path, mirror: Path | None, limit_bytes: int | None, on_progress: Progress | None
    ) -> dict[str, Any]:
        """Fetch the archive from a mirror, else a mirror's papers, else the archive from its origin."""
        in_mirror = {file for file in (ARCHIVE, DOCS) if mirror and (mirror / file.mirror_path).is_file()}
        files = (DOCS, EDGES, NETWORK) if in_mirror == {DOCS} else (ARCHIVE,)
        provenance = []
        for file in files:
            path = _raw(folder, file)
            source = fetch(file, path, mirror=mirror, limit_bytes=limit_bytes, on_progress=on_progress)
            size = path.stat().st_size
            provenance.append({"name": path.name, "from": source, "size": size, "checksum": file.checksum})
        return {"files": provenance}

    def prepare(self, raw: Path, out: Path) -> dict[str, Any]:
        """Read or build the pairs and write the arrays; the archive is preferred where both forms are there.

        Raises:
            UserError: no raw files, some that cannot be read, or a split larger than what there is.
        """
        whole = _raw(raw, ARCHIVE).exists()
        if not whole and not _raw(raw, DOCS).exists():
            raise UserError(f"no raw data of lra-retrieval in {raw}; download the task")
        try:
            found = read_archive(_raw(raw, ARCHIVE)) if whole else build_pairs(raw, self.config.seed)
        except UserError:
            raise
        except (EOFError, lzma.LZMAError, tarfile.TarError, zlib.error, OSError, ValueError, KeyError) as error:
            raise UserError(f"raw data in {raw} cannot be read, remove it and download again: {error!r}") from error
        splits, subset = {}, False
        for stream, split in enumerate(SPLITS):
            pairs, labels = np.array(found.pairs[split]), np.array(found.labels[split])
            size = getattr(self.config, f"{split}_size")
            if size is not None:
                subset = True
                generator = np.random.default_rng([self.config.seed, stream])
                rows = balanced_rows(labels, size, generator, f"lra-retrieval: {split}_size")
                found.notes.append(f"{split}: {size} of {len(labels)} pairs drawn with seed {self.config.seed}")
                pairs, labels = pairs[rows], labels[rows]
            splits[split] = (pairs, labels)
        used = np.unique(np.concatenate([pairs.ravel() for pairs, _ in splits.values()]))
        return write_dataset(
            out,
            [byte_tokens(found.texts[index]) for index in used],
            {split: (np.searchsorted(used, pairs), labels) for split, (pairs, labels) in splits.items()},
            {
                "task": "lra-retrieval",
                "num_classes": self.num_classes,
                "vocab_size": self.vocab_size,
                "num_texts": self.num_texts,
                "max_length": self.config.max_length,
                "label": ("AAN bytes" if whole else "AAN subset") + (", subset of pairs" if subset else ""),
                "source": "Long Range Arena, new_aan_pairs" if whole else "ACL Anthology Network, pairs built here",
                "notes": found.notes,
            },
        )

    @classmethod
    def encode(cls, text: str, meta: Mapping[str, Any]) -> np.ndarray:
        return byte_tokens(text.encode())

    @classmethod
    def sample(cls, raw: Path) -> Config:
        """Write forty made-up papers from 2004 on, each citing two earlier ones."""
        raw.mkdir(parents=True, exist_ok=True)
        edges = [(number, number - step) for number in range(40) for step in (1, 5) if number >= step]
        with lzma.open(_raw(raw, DOCS), "wt", encoding="utf-8") as file:
            for number in range(40):
                text = f"This is paper {number}." + " It says more." * number
                record = {"id": f"P{number:02}", "year": 2004 + number // 5, "title": f"On {number}", "text": text}
                file.write(json.dumps(record) + "\n")
        lines = [f"P{citing:02}\tP{cited:02}\n" for citing, cited in edges]
        _raw(raw, EDGES).write_text("citing\tcited\n" + "".join(lines), encoding="utf-8")
        with lzma.open(_raw(raw, NETWORK), "wt", encoding="latin-1") as file:
            file.writelines(line.replace("\t", " , ") for line in [*lines, "P39\tX00\n"])
        return cls.Config(max_length=128)


def _raw(folder: Path, file: RemoteFile) -> Path:
    return folder / PurePosixPath(file.mirror_path).name


def read_archive(path: Path) -> Pairs:
    """Return the pairs of the release: one pass over the archive, without unpacking it.

    A line holds label, two ids and two texts between tabs. A pair that another, later read split also has, in either
    order, is dropped from train first, then from dev, so that nothing tested was trained on.

    Raises:
        UserError: a file of pairs is missing, or a line of it is not as described.
    """
    names = {"train": "new_aan_pairs.train.tsv", "dev": "new_aan_pairs.eval.tsv", "test": "new_aan_pairs.test.tsv"}
    found, numbers = Pairs([]), dict[bytes, int]()
    kept_bytes = 0
    with tarfile.open(path, "r:gz") as archive:
        while (member := archive.next()) and not all(found.labels.values()):
            archive.members.clear()  # type: ignore[attr-defined]  # there are hundreds of thousands of images
            for split, name in names.items():
                if PurePosixPath(member.name).parts[-2:] != ("tsv_data", name) or not member.isfile():
                    continue
                content = archive.extractfile(member)
                assert content is not None
                empty = 0
                for label, texts in read_rows(content, f"{path.name}: {name}"):
                    if not all(texts):
                        empty += 1
                        continue
                    for text in texts:
                        if text not in numbers:
                            numbers[text] = len(numbers)
                            kept_bytes += len(text)
                    if kept_bytes > MOST_TEXTS:
                        raise UserError(f"{path.name}: {name} holds more than {MOST_TEXTS:,} bytes of texts")
                    found.add(split, (numbers[texts[0]], numbers[texts[1]]), label)
                if empty:
                    found.notes.append(f"{empty} {split} pairs dropped: a text is empty")
    found.texts = list(numbers)
    missing = [names[split] for split in SPLITS if not found.labels[split]]
    if missing:
        raise UserError(f"{path} has no pairs in tsv_data/: {', '.join(missing)}; it is not the release or incomplete")
    taken: set[frozenset[int]] = set()
    for split in reversed(SPLITS):
        pairs = [frozenset(pair) for pair in found.pairs[split]]
        kept = [row for row, pair in enumerate(pairs) if pair not in taken]
        dropped = len(pairs) - len(kept)
        taken |= set(pairs)
        found.pairs[split] = [found.pairs[split][row] for row in kept]
        found.labels[split] = [found.labels[split][row] for row in kept]
        if dropped:
            found.notes.append(f"{dropped} {split} pairs dropped: they occur in a later split")
        if not kept:
            raise UserError(f"{path}: every pair of {names[split]} occurs in a later split")
    return found


def read_rows(content: IO[bytes], where: str) -> Iterator[tuple[int, tuple[bytes, bytes]]]:
    """Read label and texts of each line; Latin-1 in and out hands the bytes through as they are.

    Raises:
        UserError: a line that is not label, two ids and two texts, which `where` helps to find.
    """
    csv.field_size_limit(MOST_TEXT)
    rows = csv.reader(_lines(content, where), delimiter="\t")
    while True:
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise UserError(f"{where}, line {rows.line_num}: {error}") from None
        if row is None:
            return
        if len(row) != 5:
            raise UserError(f"{where}, line {rows.line_num}: {len(row)} fields, where label, 2 ids and 2 texts belong")
        if row[0] not in _LABELS:
            raise UserError(f"{where}, line {rows.line_num}: the label is {shorten(row[0])}, neither 0.0 nor 1.0")
        yield _LABELS[row[0]], (row[3].encode("latin-1"), row[4].encode("latin-1"))


def _lines(content: IO[bytes], where: str) -> Iterator[str]:
    text = io.TextIOWrapper(content, "latin-1", newline="")
    while line := text.readline(2 * MOST_TEXT + 1):
        if len(line) > 2 * MOST_TEXT:
            raise UserError(f"{where}: a line is longer than {2 * MOST_TEXT:,} bytes")
        yield line


def build_pairs(raw: Path, seed: int) -> Pairs:
    """Build pairs from papers and citations, see `Retrieval`; the negatives depend on `seed` only."""
    with lzma.open(_raw(raw, DOCS), "rt", encoding="utf-8") as file:
        papers = sorted((json.loads(line) for line in file), key=lambda paper: paper["id"])
    rows = {paper["id"]: row for row, paper in enumerate(papers)}
    years = np.array([paper["year"] for paper in papers])
    with open(_raw(raw, EDGES), encoding="utf-8") as file:
        edges = sorted(tuple(rows[paper] for paper in line.rstrip("\n").split("\t")) for line in list(file)[1:])
    cited = np.array([target for _, target in edges])
    linked = np.eye(len(papers), dtype=bool)
    with lzma.open(_raw(raw, NETWORK), "rt", encoding="latin-1") as file:
        for line in file:
            source, target = (rows.get(paper.strip()) for paper in line.split(" , "))
            if source is not None and target is not None:
                linked[source, target] = linked[target, source] = True

    citations: dict[frozenset[int], tuple[int, int]] = {}
    for source, target in edges:
        known = citations.get(frozenset((source, target)))
        if known is None or years[source] > years[known[0]]:
            citations[frozenset((source, target))] = (source, target)
    found = Pairs([f"{paper['title']}\n{paper['text']}".encode() for paper in papers])
    generator = np.random.default_rng([seed, len(SPLITS)])
    alone = 0
    for source, target in sorted(citations.values()):
        candidates = cited[(years[cited] <= years[source]) & ~linked[source, cited]]
        if not len(candidates):
            alone += 1
            continue
        other = int(candidates[generator.integers(len(candidates))])
        linked[source, other] = linked[other, source] = True
        year = years[source]
        split = "train" if year <= LAST_TRAIN_YEAR else "dev" if year == DEV_YEAR else "test"
        found.add(split, (source, target), 1)
        found.add(split, (source, other), 0)
    found.notes += [
        f"{len(papers)} papers, {len(edges)} citations among them, {len(edges) - len(citations)} of these mutual",
        f"{alone} citations dropped: no paper is left for the negative",
    ]
    return found
