"""Heads of Python functions to complete: a signature, a docstring, an example.

Written for these benchmarks, in the manner of HumanEval (Chen et al. 2021, arXiv 2107.03374).
"""

from __future__ import annotations

CODE = (
    '''def running_mean(values: list[float], window: int) -> list[float]:
    """Return the mean of every run of `window` neighbouring values.
    >>> running_mean([1.0, 3.0, 5.0], 2)
    [2.0, 4.0]
    """
''',
    '''def is_palindrome(text: str) -> bool:
    """Say whether a text reads the same backwards, leaving out case and all but letters.
    >>> is_palindrome("No lemon, no melon")
    True
    """
''',
    '''def count_words(text: str) -> dict[str, int]:
    """Count how often each word occurs, in lower case and without punctuation.
    >>> count_words("The cat saw the dog.")
    {'the': 2, 'cat': 1, 'saw': 1, 'dog': 1}
    """
''',
    '''def merge_sorted(left: list[int], right: list[int]) -> list[int]:
    """Merge two sorted lists into one sorted list, in linear time.
    >>> merge_sorted([1, 4], [2, 3, 9])
    [1, 2, 3, 4, 9]
    """
''',
    '''def roman_to_int(numeral: str) -> int:
    """Return the value of a Roman numeral.
    >>> roman_to_int("MCMXCIV")
    1994
    """
''',
    '''def primes_below(limit: int) -> list[int]:
    """Return all primes below `limit`, by the sieve of Eratosthenes.
    >>> primes_below(12)
    [2, 3, 5, 7, 11]
    """
''',
    '''def balanced(brackets: str) -> bool:
    """Say whether every bracket in the text is closed by one of its kind, in the right order.
    >>> balanced("([]{})")
    True
    >>> balanced("([)]")
    False
    """
''',
    '''def transpose(matrix: list[list[int]]) -> list[list[int]]:
    """Return the transpose of a matrix that is given as a list of its rows.
    >>> transpose([[1, 2, 3], [4, 5, 6]])
    [[1, 4], [2, 5], [3, 6]]
    """
''',
    '''def caesar(text: str, shift: int) -> str:
    """Shift every letter of the text by `shift` places of the alphabet; keep what is no letter.
    >>> caesar("Hello, World", 3)
    'Khoor, Zruog'
    """
''',
    '''def longest_common_prefix(words: list[str]) -> str:
    """Return the longest text that all words begin with.
    >>> longest_common_prefix(["flower", "flow", "flight"])
    'fl'
    """
''',
    '''def binary_search(values: list[int], wanted: int) -> int:
    """Return the index of `wanted` in a sorted list, or -1 where it is not in it.
    >>> binary_search([1, 3, 5, 7], 5)
    2
    """
''',
    '''def flatten(nested: list) -> list:
    """Flatten a list whose items are values or lists of the same kind, to any depth.
    >>> flatten([1, [2, [3, 4]], 5])
    [1, 2, 3, 4, 5]
    """
''',
)
