"""Labels that come in a left and a right (design.md, contract 8)."""

from __future__ import annotations

import re

SIDES = {"left": "right", "l": "r"}


def sided_pairs(label_names: list[str]) -> list[tuple[str, str]]:
    """Pairs of names that differ only in the side.

    Example:
        >>> sided_pairs(["liver", "right_kidney", "left_kidney", "LungL", "LungR"])
        [('left_kidney', 'right_kidney'), ('LungL', 'LungR')]
    """
    spaced = {name: re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name) for name in label_names}  # LeftKidney
    words = {name: tuple(re.findall(r"[a-z0-9]+", text.lower())) for name, text in spaced.items()}
    by_words = {w: name for name, w in words.items()}
    pairs = []
    for name in label_names:
        for place, word in enumerate(words[name]):
            if word in SIDES:
                other = (*words[name][:place], SIDES[word], *words[name][place + 1 :])
                if other in by_words:
                    pairs.append((name, by_words[other]))
    return pairs
