#!/usr/bin/env python3
"""Writes a synthetic genome as FASTA: mutated repeats on both strands, in a background of few CpG, and gaps."""

from __future__ import annotations

import argparse
import gzip
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from reformer_dist.data.format.dna import reverse_complement

BASES = np.frombuffer(b"ACGT", dtype=np.uint8)
N_FAMILIES, FAMILY_LENGTHS = 12, (200, 2000)
REPEATS = 0.6  # of the genome
MUTATIONS = 0.03  # of the bases of each copy
GAP, MEAN_GAP_DISTANCE = 500, 1 << 20
LINE = 80


def background(length: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Bases with 42 % GC, in which CG is rare, as in vertebrates."""
    bases = rng.choice(BASES, size=length, p=[0.29, 0.21, 0.21, 0.29])
    is_cpg = np.append((bases[:-1] == ord("C")) & (bases[1:] == ord("G")), False) & (rng.random(length) < 0.8)
    bases[is_cpg] = ord("T")
    return bases


def make_chromosome(length: int, families: list[bytes], rng: np.random.Generator) -> bytes:
    parts: list[bytes] = []
    n_bases = n_until_gap = 0
    mean_repeat = sum(map(len, families)) / len(families)
    while n_bases < length:
        n_parts = len(parts)
        unique = background(1 + int(rng.exponential(mean_repeat * (1 - REPEATS) / REPEATS)), rng)
        copy = np.frombuffer(families[rng.integers(len(families))], dtype=np.uint8).copy()
        is_mutated = rng.random(len(copy)) < MUTATIONS
        copy[is_mutated] = rng.choice(BASES, size=int(is_mutated.sum()))
        repeat = copy.tobytes()
        parts += [unique.tobytes(), (repeat if rng.random() < 0.5 else reverse_complement(repeat)).lower()]
        if n_until_gap < 0:
            parts.append(b"N" * GAP)
            n_until_gap = int(rng.exponential(MEAN_GAP_DISTANCE))
        n_until_gap -= len(unique) + len(repeat)
        n_bases += sum(map(len, parts[n_parts:]))
    return b"".join(parts)[:length]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, help="FASTA file to write; compressed if its name ends in .gz")
    parser.add_argument("--megabases", type=float, default=24.0, help="size of the genome (default: 24)")
    parser.add_argument("--chromosomes", type=int, default=6, help="of equal length, chr1, chr2, ... (default: 6)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = np.random.default_rng(arguments.seed)
    families = [background(int(rng.integers(*FAMILY_LENGTHS)), rng).tobytes() for _ in range(N_FAMILIES)]
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    is_compressed = arguments.output.suffix == ".gz"
    with gzip.open(arguments.output, "wb") if is_compressed else arguments.output.open("wb") as file:
        for number in range(1, arguments.chromosomes + 1):
            bases = make_chromosome(int(arguments.megabases * 1e6 / arguments.chromosomes), families, rng)
            file.write(b">chr%d synthetic\n" % number)
            file.writelines(bases[i : i + LINE] + b"\n" for i in range(0, len(bases), LINE))
    print(f"{arguments.output}: {arguments.megabases:g} million bases in {arguments.chromosomes} chromosomes")


if __name__ == "__main__":
    main()
