"""Character accuracy of a transcription."""


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance of two strings."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


def character_accuracy(wanted: str, got: str) -> float:
    """1 - edit distance / length of the longer string, outer blanks ignored; 1.0 for two empty strings."""
    wanted, got = wanted.strip(), got.strip()
    return 1.0 - edit_distance(wanted, got) / max(1, len(wanted), len(got))
