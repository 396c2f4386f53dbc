#!/usr/bin/env python3
"""Pairs of a text and its one-line summary, from the descriptions of Debian's packages.

Needs Debian or Ubuntu with deb822 or one-line sources for the release that is wanted; no root, nothing is installed.

    make_debtldr.py OUT_DIR             the full set: fetch the descriptions with apt, filter, split
    make_debtldr.py --extract FROM TO   divide a full set in FROM: train.jsonl and valid.jsonl, the extract that
                                        examples/data/debtldr holds, and base.jsonl, what examples/train_base.rs learns
                                        from; no package family is in two of them

The long description of a package is the text, the short one its summary. Pairs are kept where both read as prose, and
split by package family (libfoo, python3-foo, foo-doc), so that no family is on both sides.
"""
import argparse
import collections
import hashlib
import json
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path

TEXT_WORDS = range(30, 161)
SUMMARY_WORDS = range(3, 13)
SUMMARY_CHARACTERS = 80
EXTRACT_TRAIN_PAIRS = 2600

# Packages whose descriptions differ from their neighbours' in a name only.
SERIAL_PACKAGES = re.compile(
    r"(librust-|.*-dbgsym$|.*-l10n-|.*-locale-|linux-(image|headers|modules)|gcc-|g\+\+-|task-|hunspell-|aspell-"
    r"|manpages-|fonts-|language-|texlive-lang)"
)
# Paragraphs that speak of the packaging, not of the thing packaged.
PACKAGING_PARAGRAPH = re.compile(
    r"(This package (contains|provides|includes|ships)|This is (a|an) (transitional|dummy|meta)|Install this)"
)
EMPTY_PACKAGE = re.compile(r"transitional|dummy package|metapackage|debug(ging)? symbols", re.IGNORECASE)
# "libfoo - development files": the role says nothing that the text does.
ROLE_SUFFIX = re.compile(
    r"\s*[-–(]\s*(development (files|headers|libraries)|documentation|runtime( library| files)?|common files|data files"
    r"|headers|library|static library|shared library|tools|utilities|python ?3?|examples?|binaries|plugins?)\)?\s*$",
    re.IGNORECASE,
)
ADDRESS = re.compile(r"://|www\.|\b[a-z0-9-]+\.(org|com|net|io|de|fr)\b")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT_DIR")
    parser.add_argument("--extract", type=Path, metavar="FROM", help="divide the full set in FROM")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    parts = extract(options.extract) if options.extract else split(pairs(fetch_descriptions()))
    for name, rows in parts.items():
        with open(options.out / f"{name}.jsonl", "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        print(f"{name}: {len(rows)} pairs", file=sys.stderr)


def fetch_descriptions():
    """The entries of the English description files of the main section, in apt's own format."""
    with tempfile.TemporaryDirectory() as lists:
        Path(lists, "partial").mkdir()
        subprocess.run(
            ["apt-get", "-o", f"Dir::State::Lists={lists}", "-o", "Acquire::Languages=en", "update"],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        entries = []
        for path in sorted(Path(lists).glob("*_main_i18n_Translation-en*")):
            if "security" not in path.name and "updates" not in path.name:
                content = subprocess.run(["/usr/lib/apt/apt-helper", "cat-file", path], check=True, stdout=subprocess.PIPE)
                entries += content.stdout.decode().split("\n\n")
    if not entries:
        sys.exit("apt offers no English descriptions: is a Debian or Ubuntu source with a main section configured?")
    return entries


def pairs(entries):
    """Rows {package, text, summary} of the entries that pass the filters, each text and each summary once."""
    rows, texts, summaries = [], set(), set()
    for entry in entries:
        name = re.search(r"^Package: (\S+)", entry, re.MULTILINE)
        description = re.search(r"^Description-en: (.*)$((?:\n .*)*)", entry, re.MULTILINE)
        if not name or not description or SERIAL_PACKAGES.match(name[1]):
            continue
        summary = description[1].strip()
        kept = [p for p in paragraphs(description[2]) if not PACKAGING_PARAGRAPH.match(p)]
        text = re.sub(r"\s+", " ", " ".join(kept)).strip()
        if not reads_as_prose(text, summary):
            continue
        summary = ROLE_SUFFIX.sub("", summary).strip()
        if ADDRESS.search(text + " " + summary) or len(summary.split()) not in SUMMARY_WORDS:
            continue
        opening = text[:160].lower()
        if opening in texts or summary.lower() in summaries:
            continue
        texts.add(opening)
        summaries.add(summary.lower())
        rows.append({"package": name[1], "text": text, "summary": summary})
    return rows


def paragraphs(long_description):
    """A line with a lone dot ends a paragraph; a line indented twice is an item of a list."""
    done, current = [], []
    for line in long_description.split("\n"):
        line = line[1:]
        if line.strip() == ".":
            done.append(" ".join(current))
            current = []
        elif line.startswith(" "):
            current.append("* " + line.strip().lstrip("*- "))
        elif line:
            current.append(line.strip())
    return [p for p in [*done, " ".join(current)] if p]


def reads_as_prose(text, summary):
    return (
        text.isascii()
        and summary.isascii()
        and len(text.split()) in TEXT_WORDS
        and len(summary.split()) in SUMMARY_WORDS
        and len(summary) <= SUMMARY_CHARACTERS
        and "http" not in summary
        and not EMPTY_PACKAGE.search(summary + " " + text[:80])
    )


def split(rows):
    """4% of the families are for testing, 4% for validation; the test part is left unwritten, for later judges."""
    parts = collections.defaultdict(list)
    for row in rows:
        bucket = int(hashlib.sha256(family(row["package"]).encode()).hexdigest(), 16) % 100
        parts["test" if bucket < 4 else "valid" if bucket < 8 else "train"].append(row)
    rng = random.Random(0)
    for part in parts.values():  # in the order of first appearance, which the shuffles depend on
        rng.shuffle(part)
    return {name: parts[name] for name in ("train", "valid")}


def family(package):
    stem = re.sub(r"^(lib|python3?-|ruby-|node-|golang-[a-z]+-|r-cran-|r-bioc-)", "", package)
    return re.split(r"[-0-9.]", stem)[0] or stem


def extract(folder):
    """Validation whole; training divided by families, drawn with seed 0, so that what feedback is given on is new to the
    base model."""
    full = {}
    for name in ("train", "valid"):
        with open(folder / f"{name}.jsonl") as file:
            full[name] = [json.loads(line) for line in file]
    families = collections.defaultdict(list)
    for row in full["train"]:
        families[family(row["package"])].append(row)
    order = sorted(families)
    random.Random(0).shuffle(order)
    parts = {"train": [], "base": [], "valid": full["valid"]}
    for name in order:
        part = "train" if len(parts["train"]) + len(families[name]) <= EXTRACT_TRAIN_PAIRS else "base"
        parts[part] += families[name]
    for part in ("train", "base"):
        random.Random(0).shuffle(parts[part])
    return parts


if __name__ == "__main__":
    main()
