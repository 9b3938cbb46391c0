"""Write the quickstart's rows: customer messages, and the JSON that a shop's system needs.

    python recipes/quickstart/make_data.py

`train.jsonl` holds the mess of real exports on purpose (PLANTED says what and how much),
`test.jsonl` is clean, and `retention.jsonl` is general text that pretraining never saw.
The same seed gives the same bytes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import unicodedata
from pathlib import Path

from corpus import CITIES, THINGS, Facts, choose, documents, draw_facts, fill, story, styled

CLEAN_TRAIN_ROWS = 2250
TEST_ROWS = 300
RETENTION_ROWS = 200

#: What is wrong with train.jsonl, and how many lines of each.
PLANTED = {
    "exact duplicate": 110,
    "duplicate but for white space": 50,
    "duplicate but for Unicode form": 30,
    "empty answer": 45,
    "over 256 tokens": 35,
    "wrong type": 40,
    "malformed line": 12,
    "leak from the test file": 30,
}

Row = dict[str, object]

#: The shop is small: the values of an answer come from these, so that a small model can learn
#: them from two thousand rows. Messages also hold order numbers, names and amounts, which no
#: answer asks for.
PRODUCTS = THINGS[:16]
SHOPS = CITIES[:16]
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

# An intent: the fields of its answer, each with the fact that it holds, and how customers ask.
INTENTS: dict[str, tuple[dict[str, str], tuple[str, ...]]] = {
    "track_order": (
        {"product": "product"},
        (
            "[where is|where's] my <product>? [order|number] <Order>",
            "[any news on|what about|status of] the <product>, order <Order>[?|, please]",
            "I [ordered|bought] a <product> [for <Amount> |]and it is still not here. <Order>",
            "when [will|does] my <product> [arrive|get here]?[ order <Order>|]",
        ),
    ),
    "cancel_order": (
        {"product": "product"},
        (
            "[please |I want to |can you ]cancel [order <Order>, |]the <product>",
            "I [no longer need|do not want] the <product>, [so stop|cancel|call off] order <Order>",
            "[stop|drop|forget about] the <product>[, order <Order>|]",
            "[bought|ordered] the <product> twice, cancel <Order>",
        ),
    ),
    "refund": (
        {"product": "product"},
        (
            "[I want|give me|please send] my <Amount> back for the <product>, order <Order>",
            "the <product> was [bad|late|not mine], [refund|pay back] <Amount>",
            "[refund|money back] of <Amount> for [a|the|my] <product> [please|now]",
            "you [still |]owe me <Amount> for the <product>",
        ),
    ),
    "change_address": (
        {"product": "product", "city": "city"},
        (
            "I moved to <city>. [please update|it is about] the <product>, <Order>",
            "[send|deliver|ship] the <product> to <city> [instead|not here]",
            "[wrong|new] address for my <product>! it [must|has to] go to <city>",
            "[can|could] my <product> go to <city>[| instead]?",
        ),
    ),
    "book_delivery": (
        {"product": "product", "day": "day"},
        (
            "[deliver|bring] the <product> on <Day>[ please|]",
            "I am [home|free] on <Day>, [bring|deliver|drop off] the <product>",
            "[book|plan] the delivery of my <product> for <Day>[, order <Order>|]",
            "<Day> [suits me|is fine|works] for the <product>",
        ),
    ),
    "report_damage": (
        {"product": "product"},
        (
            "the <product> [arrived broken|is cracked|came in pieces]. order <Order>",
            "[order <Order>: |][broken|damaged|scratched] <product>[!|]",
            "[my|the] <product> does not [work|open][, order <Order>|]",
            "there is a [hole|crack|stain] in [my|the] <product>",
        ),
    ),
    "check_stock": (
        {"product": "product", "city": "city"},
        (
            "[do you have|is there|have you got] a <product> in [your |the |]<city>[ shop|]?",
            "[looking for|I need] a <product>. [any|is there one] in <city>?",
            "how many <product>s [are left|do you have] in <city>?",
            "can I [buy|pick up] a <product> in <city>?",
        ),
    ),
    "exchange": (
        {"product": "product", "replacement": "product2"},
        (
            "[swap|exchange|change] my <product> for a <product2>",
            "I [got|bought] a <product> but [want|need|meant] a <product2>",
            "my <product> is [too small|not my taste], [send|give me] a <product2>[ instead|]",
            "here is the <product> back, [send|give me] a <product2>[ for it|]",
        ),
    ),
    "call_back": (
        {"day": "day"},
        (
            "[please call me|ring me|phone me] [back |]on <Day>. <name>",
            "[my name is|this is] <name>, [call me|I want a call] on <Day>[ about <Order>|]",
            "[can someone|could you] [phone|call] <name> on <Day>?",
            "<name> here, [I can talk|call me] on <Day>",
        ),
    ),
    "opening_hours": (
        {"city": "city", "day": "day"},
        (
            "[when|at what time] [do you|does the shop] open in <city> on <Day>?",
            "[is|will] the <city> shop [be |]open on <Day>?",
            "opening hours [in|of] <city>[ please|], for <Day>",
            "how long is <city> open on <Day>?",
        ),
    ),
}  # fmt: skip

OPENINGS = (
    "hi, |hello! |hello, |good morning, |hey |dear team, |excuse me, |help! |sorry to bother you. |"
    "second time I write! |quick question: "
)
CLOSINGS = " thanks| thank you!| please hurry| cheers| many thanks| it is urgent| asap|!!"


def with_typo(rng: random.Random, template: str) -> str:
    """`template` with one of its longer words misspelt; slots stay, so the answer stays."""
    words = template.split(" ")
    places = [index for index, word in enumerate(words) if len(word) > 4 and word.isalpha()]
    if not places:
        return template
    place = rng.choice(places)
    word = words[place]
    at = rng.randrange(1, len(word) - 1)
    words[place] = rng.choice(
        (
            word[:at] + word[at + 1] + word[at] + word[at + 2 :],
            word[:at] + word[at + 1 :],
            word[:at] + word[at] + word[at:],
        )
    )
    return " ".join(words)


def shop_facts(rng: random.Random) -> Facts:
    """What a message is about: a general document's facts, with the shop's own few values."""
    products = rng.sample(PRODUCTS, 2)
    day = rng.choice(DAYS)
    return draw_facts(rng) | {
        "product": products[0],
        "product2": products[1],
        "city": rng.choice(SHOPS),
        "day": day.lower(),
        "Day": rng.choice((day, day, f"{day} morning", f"next {day}", day.lower(), day[:3])),
    }


def make_row(rng: random.Random) -> Row:
    """One clean message and its answer."""
    intent = rng.choice(list(INTENTS))
    fields, templates = INTENTS[intent]
    facts = shop_facts(rng)
    template = choose(rng, rng.choice(templates))
    if rng.random() < 0.15:
        template = with_typo(rng, template)
    if rng.random() < 0.4:
        template = choose(rng, f"[{OPENINGS}]") + template
    if rng.random() < 0.3:
        template += choose(rng, f"[{CLOSINGS}]")
    prompt = fill(template, facts)
    if rng.random() < 0.5:
        prompt = prompt[0].upper() + prompt[1:]
    return {"prompt": styled(rng, prompt), "completion": answer(intent, fields, facts)}


def answer(intent: str, fields: dict[str, str], facts: Facts) -> str:
    """The JSON that a message stands for, its fields in the order of INTENTS."""
    values = {field: facts[fact] for field, fact in fields.items()}
    return json.dumps({"intent": intent, **values}, ensure_ascii=False)


def normal(text: object) -> str:
    """White space and Unicode form evened out: rows that agree in this are duplicates."""
    return " ".join(unicodedata.normalize("NFC", str(text)).split())


def distinct_rows(rng: random.Random, count: int) -> list[Row]:
    """`count` clean rows, no two with the same message, however it is spaced or capitalised."""
    rows: dict[str, Row] = {}
    while len(rows) < count:
        row = make_row(rng)
        rows.setdefault(normal(row["prompt"]).casefold(), row)
    return list(rows.values())


def respaced(rng: random.Random, row: Row) -> Row:
    """The row with other white space in its message."""
    words = str(row["prompt"]).split(" ")
    at = rng.randrange(1, len(words))
    gap = rng.choice(("  ", "\t", "\u00a0", " \n"))
    return row | {"prompt": " ".join(words[:at]) + gap + " ".join(words[at:])}


def decomposed(row: Row) -> Row:
    """The row with its accents as combining marks."""
    return {key: unicodedata.normalize("NFD", str(value)) for key, value in row.items()}


def rambling(rng: random.Random, row: Row) -> Row:
    """The row with over 256 words, hence tokens, before its message."""
    ramble = ""
    while len(ramble.split()) <= 256:
        ramble += story(rng) + " "
    return row | {"prompt": ramble + str(row["prompt"])}


def mistyped(rng: random.Random, row: Row) -> Row:
    """The row with a field that is no text, or without its message."""
    return rng.choice(
        (
            row | {"completion": rng.randint(0, 99)},
            row | {"completion": None},
            row | {"completion": [row["completion"]]},
            row | {"prompt": rng.randint(10000, 99999)},
            {"completion": row["completion"]},
        )
    )


def malformed(rng: random.Random, row: Row) -> str:
    """A line that is no JSON."""
    line = json.dumps(row, ensure_ascii=False)
    return rng.choice((line[: len(line) // 2], line.replace('"', "'"), line[:-1] + ",}", line[1:]))


def messy_train_lines(rng: random.Random, clean: list[Row], test: list[Row]) -> list[str]:
    """The lines of train.jsonl: `clean`, and what PLANTED lists, shuffled together."""

    def some(kind: str, rows: list[Row]) -> list[Row]:
        return rng.sample(rows, PLANTED[kind])

    accented = [row for row in clean if decomposed(row) != row]
    spare = distinct_rows(rng, sum(PLANTED.values()))
    seen = {normal(row["prompt"]).casefold() for row in [*clean, *test]}
    fresh = iter([row for row in spare if normal(row["prompt"]).casefold() not in seen])

    def new(kind: str) -> list[Row]:
        return list(itertools.islice(fresh, PLANTED[kind]))

    rows = [
        *clean,
        *some("exact duplicate", clean),
        *(respaced(rng, row) for row in some("duplicate but for white space", clean)),
        *(decomposed(row) for row in some("duplicate but for Unicode form", accented)),
        *(row | {"completion": rng.choice(("", "  "))} for row in new("empty answer")),
        *(rambling(rng, row) for row in new("over 256 tokens")),
        *(mistyped(rng, row) for row in new("wrong type")),
        *(rng.choice((row, respaced(rng, row))) for row in some("leak from the test file", test)),
    ]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    lines += [malformed(rng, row) for row in new("malformed line")]
    rng.shuffle(lines)
    return lines


def write_lines(path: Path, lines: list[str]) -> None:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")


def make(out: Path, seed: int) -> None:
    """Write the three files to `out`."""
    rng = random.Random(f"quickstart data {seed}")
    rows = distinct_rows(rng, CLEAN_TRAIN_ROWS + TEST_ROWS)
    clean, test = rows[:CLEAN_TRAIN_ROWS], rows[CLEAN_TRAIN_ROWS:]
    retention = itertools.islice(documents("retention"), RETENTION_ROWS)

    out.mkdir(parents=True, exist_ok=True)
    write_lines(out / "train.jsonl", messy_train_lines(rng, clean, test))
    write_lines(out / "test.jsonl", [json.dumps(row, ensure_ascii=False) for row in test])
    write_lines(
        out / "retention.jsonl",
        [json.dumps({"text": text}, ensure_ascii=False) for text in retention],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    make(args.out, args.seed)

    counts = {"clean": CLEAN_TRAIN_ROWS, **PLANTED}
    for kind, count in [*counts.items(), ("lines in train.jsonl", sum(counts.values()))]:
        print(f"{kind:32} {count:5}")
    print(f"{'rows in test.jsonl':32} {TEST_ROWS:5}")
    print(f"{'rows in retention.jsonl':32} {RETENTION_ROWS:5}")


if __name__ == "__main__":
    main()
