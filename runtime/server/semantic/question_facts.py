"""Which facts of two questions differ, whatever their embeddings say.

Embeddings of "What is the capital of France?" and "... of Finland?" are closer than those of most
paraphrases. So two questions are told apart by words, too: their numbers, negations and opposites,
names and units must be the same, and one must not be the other with words put in or replaced.
Negations, opposites and units are English; the other rules work for every language that writes
spaces. The rules are made for these differences and know no others.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import SequenceMatcher

# Two questions that differ in other words in so many places only are different questions.
_MAX_CHANGED_PLACES = 2
_MAX_REPLACED_WORDS = 2  # at one place
# Longer questions are the same in every word, or different: the time of a comparison grows with the
# cube of their length, and the event loop would wait for it.
_MAX_COMPARED_WORDS = 128
_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*|\d+(?:[.,:]\d+)*|[^\w\s]")
_NUMBER = re.compile(r"\d+(?:[.,:]\d+)*")


def _word_set(text: str) -> frozenset[str]:
    return frozenset(text.split())


# "one" is no number here: it is a pronoun, too ("which one", "how does one").
_NUMBER_WORDS = {
    "zero": "0",
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "ten": "10",
    "eleven": "11",
    "twelve": "12",
    "twenty": "20",
    "hundred": "100",
    "thousand": "1000",
}
_NEGATIONS = _word_set(
    "no not never none nor neither nothing nobody without cannot except excluding unless"
)
# Words whose opposite is asked for otherwise. A question with a word of a row must meet one with a
# word of the same row.
_OPPOSITES = [
    _word_set(row)
    for row in (
        "disable deactivate",
        "block forbid deny",
        "stop",
        "remove delete",
        "decline reject refuse",
        "decrease reduce lower",
        "lose",
        "disadvantage drawback",
        "illegal forbidden",
        "unsafe dangerous",
        "younger newer",
        "last final",
        "after",
        "sell",
        "close shut",
        "maximum most",
        "minimum least fewest",
        "worst",
    )
]
_UNITS = _word_set(
    "millimeter centimeter meter kilometer inch foot yard mile fathom acre hectare gram kilogram "
    "ounce pound ton stone teaspoon tablespoon cup pint gallon liter milliliter second minute hour "
    "day week month year celsius fahrenheit kelvin volt millivolt watt kilowatt joule calorie bar "
    "psi pascal bit byte kilobyte megabyte gigabyte terabyte megabit gigabit euro dollar cent yen "
    "percent mg kg km cm mm ml kb mb gb tb"
)
_SPELLINGS = {
    "metre": "meter",
    "kilometre": "kilometer",
    "litre": "liter",
    "inche": "inch",  # of "inches"
    "feet": "foot",
    "hourly": "hour",
    "daily": "day",
    "weekly": "week",
    "monthly": "month",
    "yearly": "year",
    "%": "percent",
}
# Words that change nothing about what is asked.
_FILLERS = _word_set(
    "a an the of in on at to for from by with and or is are was were be been do does did can could "
    "will would shall should may might must have has had i you he she it we they me my your his "
    "her its our their one this that these those there what which who whom whose when where why "
    "how please tell explain describe give list name show say about as so than then some any also "
    "just now"
)


def differing_facts(first: str, second: str) -> str | None:
    """What two questions differ in: "numbers", "negation", "names", "units" or "words".

    None: nothing that is found.
    """
    first_words = _words(first)
    second_words = _words(second)
    if _numbers(first_words) != _numbers(second_words):
        return "numbers"
    if _polarity(first_words) != _polarity(second_words):
        return "negation"
    if _units(first_words) != _units(second_words):
        return "units"
    if _names(first_words) - _stems(second_words) or _names(second_words) - _stems(first_words):
        return "names"
    is_long = max(len(first_words), len(second_words)) > _MAX_COMPARED_WORDS
    if is_long and first_words != second_words:
        return "words"
    if not is_long and _differ_in_few_words(first_words, second_words):
        return "words"
    return None


def _words(text: str) -> list[str]:
    return _WORD.findall(text.replace("\u2019", "'"))


def _numbers(words: Iterable[str]) -> set[str]:
    found = set()
    for word in words:
        if _NUMBER.fullmatch(word):
            found.add(word)
        elif word.lower() in _NUMBER_WORDS:
            found.add(_NUMBER_WORDS[word.lower()])
    return found


def _polarity(words: list[str]) -> tuple[bool, frozenset[int]]:
    """Whether there is a negation, and which rows of _OPPOSITES have a word in the question."""
    lowered = [word.lower() for word in words]
    negated = any(word in _NEGATIONS or word.endswith("n't") for word in lowered)
    stems = _stems(words) | set(lowered)
    rows = frozenset(index for index, row in enumerate(_OPPOSITES) if stems & row)
    return negated, rows


def _units(words: Iterable[str]) -> set[str]:
    stems = _stems(words)
    return {_SPELLINGS.get(stem, stem) for stem in stems} & _UNITS


def _names(words: list[str]) -> set[str]:
    """The stems of words with a capital letter that do not begin a sentence.

    The other question may begin with the name, or may have it in small letters.
    """
    found = []
    is_start = True
    for word in words:
        has_capital = word != word.lower() and word != "I"
        if has_capital and (not is_start or word[1:] != word[1:].lower()):
            found.append(word)
        is_start = word in ".?!"
    return _stems(found)


def _stems(words: Iterable[str]) -> set[str]:
    return {_stem(word.lower().removesuffix("'s")) for word in words}


def _differ_in_few_words(first: list[str], second: list[str]) -> bool:
    """Whether one question is the other with words put in, or with a few replaced by others.

    Only words with a meaning count. A paraphrase moves words, or replaces longer parts.
    """
    a = [_NUMBER_WORDS.get(word.lower(), word.lower()) for word in first if word.isalnum()]
    b = [_NUMBER_WORDS.get(word.lower(), word.lower()) for word in second if word.isalnum()]
    changes = []  # for each changed place: whether the first and the second have words of their own
    for kind, a_start, a_stop, b_start, b_stop in SequenceMatcher(None, a, b, False).get_opcodes():
        if kind == "equal":
            continue
        words_a = _meaningful(a[a_start:a_stop])
        words_b = _meaningful(b[b_start:b_stop])
        change = bool(words_a - words_b), bool(words_b - words_a)
        if not any(change):
            continue
        length = max(a_stop - a_start, b_stop - b_start)
        if kind == "replace" and (length > _MAX_REPLACED_WORDS or not all(change)):
            return False
        changes.append(change)
    # All of them are replacements, or all of them are additions to the same question.
    return 0 < len(changes) <= _MAX_CHANGED_PLACES and len(set(changes)) == 1


def _meaningful(words: Iterable[str]) -> set[str]:
    return {_stem(word) for word in words if word not in _FILLERS}


def _stem(word: str) -> str:
    """The word without the ending of a plural."""
    if word.endswith("ies") and len(word) > 4:
        return f"{word[:-3]}y"
    return word[:-1] if word.endswith("s") and not word.endswith("ss") else word
