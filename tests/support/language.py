"""A small film-review language: what the tests read and write."""

from __future__ import annotations

# Words of a small film-review language: what the tests read and write.
WORDS = (
    "the a film movie story plot actor director scene script music ending hero love war "
    "is was has feels seems good great fine warm funny bad dull weak slow boring and but with "
    "very quite too never not of in it this that one two end ##s ##ed ##ing ##ly un ##like . , !"
).split()
GOOD = ("good", "great", "fine", "warm", "funny")
BAD = ("bad", "dull", "weak", "slow", "boring")
def review(generator, mood: tuple[str, ...]) -> str:
    """One sentence of the small language."""
    plain = [word for word in WORDS if word.isalpha() and word not in GOOD + BAD]
    words = list(generator.choice(plain, size=int(generator.integers(3, 9))))
    words.insert(int(generator.integers(len(words) + 1)), str(generator.choice(mood)))
    return " ".join(words) + " ."
