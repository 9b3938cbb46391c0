"""English text of our own making: customer chats, little stories, notes and read-backs.

`make_base.py` pretrains on it and `make_data.py` takes the retention rows from it. Everything is
drawn from one seeded generator, so nothing has to be downloaded or shipped. The documents repeat
what they have named (an order number, a city, a price), because a model that has learnt to copy
can later be taught in minutes which parts of a message to copy. No document holds JSON.

A template has alternatives and slots: `[Hi|Hello], order <order> [is late|has not come].`
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Iterator
from typing import Literal

BOS, END, PAD, USER, ASSISTANT = "<|bos|>", "<|end|>", "<|pad|>", "<|user|>", "<|assistant|>"

Facts = dict[str, str]
Split = Literal["pretrain", "heldout", "retention"]


def words(text: str) -> list[str]:
    return text.split()


CITIES = words(
    "Oslo Bergen Lisbon Porto Málaga Zürich Köln Graz Ghent Lyon Turin Kraków Brno Riga Tartu "
    "Turku Malmö Aarhus Leeds Cork Bristol Denver Austin Boston Salem Perth Hobart Nagoya Osaka "
    "Lima Quito Recife Accra Nairobi Tunis Izmir Haifa Pune Jaipur Hanoi Cebu Dakar Galway Bologna "
    "Seville Geneva Utrecht Gdańsk Vilnius Split"
)
CITIES += ["New York", "San Diego", "Cape Town", "The Hague", "Santa Fe", "Hong Kong"]

FIRST_NAMES = words(
    "Mara Jonas Lena Omar Priya Hugo Nadia Felix Ingrid Tomas Aisha Viktor Clara Diego Yuki Samir "
    "Greta Paulo Zoë José Renée Björn Anna Peter Sofia Liam Emma Noah Olga Ivan Maya Arjun Leila "
    "Karim Helga Marco Bianca Stefan Ruth Daniel Sarah Simon Julia Kofi Amara Chen Mei Hana Kenji "
    "Rosa Pablo Irene Adam Eva Niko Tara Boris Fatima Gloria Walter"
)

LAST_NAMES = words(
    "Lind Berger Costa Haddad Nair Weber Moreau Novak Olsen Silva Rossi Tanaka Sato Mensah Okafor "
    "Petrov Kovac Dupont Müller García Larsen Ortega Fischer Hughes Byrne Walsh Carter Hill Stone "
    "Baker Young Price Reed Ward Brooks Kaya Demir Rahman Iyer Das Wong Park Kim Nguyen Santos "
    "Vega Romero Keller Brandt Winter"
)

QUALITIES = words(
    "blue red green black white grey yellow brown small large round wooden steel glass cotton "
    "leather folding silver"
)

THINGS = words(
    "kettle lamp chair table rug mirror clock teapot backpack blanket pillow vase shelf bottle "
    "toaster speaker keyboard monitor headset jacket scarf umbrella suitcase wallet basket bowl "
    "mug plate knife ladder heater fan stool desk tent helmet radio camera notebook curtain"
)

MONTHS = words(
    "January February March April May June July August September October November December"
)

REMARKS = ("fragile", "gift wrap", "urgent", "paid", "call first", "leave at door", "heavy", "new")


def ordinal(day: int) -> str:
    """1st, 2nd, 3rd, 4th … of a day of the month."""
    suffix = "th" if day in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")
    return f"{day}{suffix}"


def draw_date(rng: random.Random) -> tuple[str, str]:
    """A date in its normal form MM-DD, and as a customer writes it."""
    month, day = rng.randrange(12), rng.randint(1, 28)
    name = MONTHS[month]
    said = rng.choice(
        (
            f"{day} {name}",
            f"{name} {day}",
            f"{name} {ordinal(day)}",
            f"the {ordinal(day)} of {name}",
        )
    )
    return f"{month + 1:02d}-{day:02d}", said


def draw_amount(rng: random.Random) -> tuple[str, str]:
    """An amount in its normal form (two decimals, no currency), and as a customer writes it."""
    whole = rng.randint(3, 499)
    cents = 0 if rng.random() < 0.4 else rng.randrange(5, 100, 5)
    normal = f"{whole}.{cents:02d}"
    short = str(whole) if cents == 0 else normal
    comma = normal.replace(".", ",")
    said = rng.choice(
        (
            f"${normal}",
            f"${short}",
            f"{short} dollars",
            f"{normal} euros",
            f"{comma} €",
            short + " eur",
        )
    )
    return normal, said


def draw_facts(rng: random.Random) -> Facts:
    """What one document is about, under the names of the slots.

    `order`, `amount` and `date` are normal forms; `Order`, `Amount` and `Date` are the same as
    customers write them. There is a second of each kind: `order2`, `city2` …
    """
    facts: Facts = {}
    cities = rng.sample(CITIES, 2)
    firsts = rng.sample(FIRST_NAMES, 2)
    things = rng.sample(THINGS, 2)
    for index, suffix in enumerate(("", "2")):
        order = str(rng.randint(10000, 99999))
        facts[f"order{suffix}"] = order
        facts[f"Order{suffix}"] = rng.choice(
            (order, f"#{order}", f"no. {order}", f"number {order}", f"nr {order}", order)
        )
        facts[f"city{suffix}"] = cities[index]
        facts[f"first{suffix}"] = firsts[index]
        facts[f"name{suffix}"] = f"{firsts[index]} {rng.choice(LAST_NAMES)}"
        facts[f"product{suffix}"] = f"{rng.choice(QUALITIES)} {things[index]}"
        facts[f"amount{suffix}"], facts[f"Amount{suffix}"] = draw_amount(rng)
        facts[f"date{suffix}"], facts[f"Date{suffix}"] = draw_date(rng)
    return facts


CHOICE = re.compile(r"\[([^\[\]]*)\]")
SLOT = re.compile(r"<(\w+)>")


def choose(rng: random.Random, template: str) -> str:
    """`template` with one of each `[a|b|c]` taken, the innermost first."""
    while "[" in template:
        template = CHOICE.sub(lambda match: rng.choice(match[1].split("|")), template)
    return template


def fill(template: str, facts: Facts) -> str:
    """`template` with the facts in place of its `<slots>`."""
    return SLOT.sub(lambda match: facts[match[1]], template)


def say(rng: random.Random, template: str, facts: Facts) -> str:
    """One wording of a template about `facts`."""
    return fill(choose(rng, template), facts)


def quoted(rng: random.Random, template: str) -> str:
    """`template`, now and then with its facts in quotes or the like."""
    if rng.random() < 0.55:
        return template
    left, right = rng.choice(QUOTES)
    return SLOT.sub(lambda match: f"{left}{match[0]}{right}", template)


def styled(rng: random.Random, text: str) -> str:
    """`text` as a hurried customer types it: mostly as it is, now and then small or CAPITAL."""
    dice = rng.random()
    return text.lower() if dice < 0.22 else text.upper() if dice < 0.28 else text


# How a fact may be set off in writing. A word after a quote is another token than after a space;
# only text that has both teaches that they are the same word.
QUOTES = (('"', '"'), ('"', '"'), ("'", "'"), ("(", ")"), ("*", "*"), ("=", ""))

GREETING = "[Hi|Hello|Good morning|Good evening|Hey|Dear team][,|.|!] "

# What a customer writes, and what the agent replies.
CHATS = (
    (
        "[My parcel|My package|The delivery|My order] <Order> [is late|has not come|"
        "never came|is still not here].",
        "[Sorry to hear that|I am sorry|Let me look]. Order <order> [left|has left] <city> on "
        "<Date> and [should be with you by|arrives on] <Date2>.",
    ),
    (
        "[Can I|May I|I would like to|I want to] [buy|order] a <product> [for|at] <Amount>"
        "[| and send it to <city>]?",
        "[Yes|Of course|Certainly], the <product> is <amount>[| today] and we ship it "
        "[from|out of] <city2>.",
    ),
    (
        "[I am|My name is|This is|It is] <name>[ from <city>|, I live in <city>].",
        "[Hello|Welcome|Good day|Thank you], <name>. [How is <city>?|I see your account in <city>.|"
        "What can I do for you, <first>?]",
    ),
    (
        "[Do you have|Is there|Have you got] a <product> [in|in your <city> shop in|near] <city>?",
        "[There are|We have] [two|three|five|nine] <product>s in <city>[|, <first>]. [Each|One] "
        "costs <amount>.",
    ),
    (
        "The <product> [came broken|is cracked|does not work|arrived in pieces]. "
        "[Order|It was order|It is from order] <Order>.",
        "[That should not happen|How annoying]. I [will send|have sent] a new <product> for order "
        "<order>[| to <city>].",
    ),
    (
        "[I paid|You took|My card shows] <Amount> [on|for] <Date>, [why|what is that for]?",
        "[The amount|The payment|The charge] of <amount> on <date> [is for|belongs to] order "
        "<order>, [a|one] <product>.",
    ),
    (
        "[Please|Could you] [send|bring|ship] [it|order <Order>|my things] to <city> [on|by] "
        "<Date>.",
        "[Done|Sure|All right]: [it|the parcel] goes to <city> on <date>[|, order <order>].",
    ),
    (
        "[I moved|We moved|I have moved] from <city> to <city2>. [My order is|The order is] "
        "<Order>.",
        "[Good luck in <city2>!|How nice.] Order <order> [now goes to|is sent to] <city2>, not "
        "<city>.",
    ),
    (
        "[Swap|Change|Exchange] [my|the] <product> for a <product2>[, please|].",
        "[A|One] <product2> [instead of|in place of] the <product>, [of course|no problem]. The "
        "[difference|rest] is <amount>.",
    ),
    (
        "[Ask|Tell] <name> [to call me|to write to me] on <Date>[| about <Order>].",
        "[I will tell <first>|<first> will call you|<name> is told]. [It is|You wrote] <date>.",
    ),
    (
        "[Who|Which driver] [brings|carries] order <Order> to <city>?",
        "<name2> [brings|carries] order <order>[| from <city2>] to <city>. Ask for <first2>.",
    ),
    (
        "[Is|Was] <Order> [the number of|for] the <product> or the <product2>?",
        "<order> is the <product>; <order2> is the <product2>.",
    ),
)

# The agent sums up what the customer said: facts by name, in any order.
SUMMARY_ASKS = {
    "order": "[|it is |about |for ]order <Order>",
    "city": "[in|to|from|near] <city>",
    "amount": "[for|it was|I paid|worth] <Amount>",
    "date": "[on|by|before|since] <Date>",
    "product": "[a|the|my|one] <product>",
    "name": "[I am|for|ask|name] <name>",
}

# A second question, and the fact that must have been named before it can be asked.
FOLLOW_UPS = (
    ("first", "[Thanks|Thank you|Great|Good][|, that is all].", "[Gladly|Any time], <first>."),
    ("order", "[So|You mean] <order>[, right|, yes]?", "[Yes|Right|Exactly], <order>."),
    ("order", "[What was|Say again] the [number|order number]?", "[It is|The number is] <order>."),
    ("product", "[And|But] the <product>?", "The <product> [is packed|is on its way]."),
    ("city", "[Which city|Where to] [was it|again]?", "<city>[|, as you said]."),
    ("amount", "[How much|What price] [was it|again]?", "<amount>[|, as before]."),
    ("date", "[When|Which day] [was it|again]?", "[On|It is] <date>."),
)

STORY_OPENINGS = (
    "<first> lived in <city> [with|near|next to] <first2>.",
    "[One morning|Last winter|In <month>] <first> [found|bought|lost] a <product> in <city>.",
    "<first> and <first2> [ran|kept|opened] a [small|quiet|busy] shop in <city>.",
    "It was [raining|snowing|hot|windy] in <city> when <first> [met|called|wrote to] <first2>.",
    "Nobody in <city> had seen a <product> like [that of <first>|the one <first> had].",
)
STORY_MIDDLES = (
    "<first2> [wanted|needed|asked for] the <product>, [but|and] <first> [said no|laughed|agreed].",
    '"[Where|What] is the <product>?" [asked|said|shouted] <first2>. "[Here|At home|In <city2>]," '
    "[said|answered] <first>.",
    "The <product> [cost|was worth] <amount>, and <first> had [only |just |]<amount2>.",
    "[They|<first> and <first2>] took the [train|bus|boat] from <city> to <city2>.",
    "<first> [put|hid|left] the <product> [under|behind|beside] the <product2>.",
    '"[Never|Do not] [sell|lose|touch] the <product>, <first>," [said|warned] <first2>.',
    "[After lunch|Later] <first> [cooked|read|slept] and <first2> [sang|worked|walked].",
    "A letter came from <city2>. [It was for <first>|<first2> had sent it|<first2> read it aloud].",
    "<first> [gave|sold|lent] the <product> to <first2> [for|and got] <amount>.",
    "On <Date> the <product2> [broke|was gone|fell], and <first2> [cried|was glad].",
)
STORY_ENDINGS = (
    "[In the end|At last|So] <first> [kept|sold|found] the <product>.",
    "[Since then|From that day] <first> and <first2> [are friends|live in <city2>|meet in <city>].",
    "And the <product>? It is [still|back] in <city>[| with <first2>].",
    "<first> [never|often|sometimes] [goes|went] back to <city>.",
)

NOTES = (
    "Note {<remark>}: order <order> for <name>, <city>. [Packed|Checked|Loaded]: <product>. Order "
    "<order> [leaves|goes out] on <date>.",
    "Price list. <product>: <amount>. <product2>: <amount2>. [The <product> costs <amount>.|The "
    "<product2> costs <amount2>.|Together: <product> and <product2>.]",
    "Shelf <shelf> holds the <product>. Shelf <shelf2> holds the <product2>. "
    "[Take|For] the <product> [from|go to] shelf <shelf>.",
    "[Route|Tour] of <Date>: <city>, <city2>. <first> drives to <city>; <first2> drives "
    "to <city2>. [In <city>|For <city>]: order <order>. [In <city2>|For <city2>]: order <order2>.",
    "Invoice <order>. Name: <name>. Amount: <amount>. Date: <date>. [Paid by|Thank you,] <name>.",
    "The <product> is [light|strong|handy|soft|well made] and [made|sold] in <city>. "
    "[Buyers|People] in <city> [like|love] this <product>. It costs <Amount> (<amount>).",
    "{<remark>} Return of <Date> (<date>): the <product> of order <order> came back from <name> "
    "in <city>. We [owe|pay] <first> <amount>.",
    "Calendar. <Date> is <date>. <Date2> is <date2>. "
    "[On <date> <first> works.|On <date2> <first2> works.]",
    "Cash book: <Amount> is <amount>; <Amount2> is <amount2>. <name> paid <amount>. "
    "<name2> paid <amount2>.",
)


def chat(rng: random.Random) -> str:
    """A customer and an agent, one or two exchanges, with the turns' special tokens."""
    facts = draw_facts(rng)
    greeting = GREETING if rng.random() < 0.4 else ""
    ask, reply = summary(rng) if rng.random() < 0.5 else rng.choice(CHATS)
    text = exchange(rng, greeting + ask, reply, facts)
    if rng.random() < 0.4:
        possible = [follow_up for follow_up in FOLLOW_UPS if facts[follow_up[0]] in text]
        if possible:
            _, ask, reply = rng.choice(possible)
            text += exchange(rng, ask, reply, facts)
    return text


def exchange(rng: random.Random, ask: str, reply: str, facts: Facts) -> str:
    """A customer's turn and the agent's."""
    asked = styled(rng, say(rng, ask, facts))
    return f"{USER}{asked}{END}{ASSISTANT}{say(rng, quoted(rng, reply), facts)}{END}"


def summary(rng: random.Random) -> tuple[str, str]:
    """A message that names two to four facts, and a reply that lists them under their names."""
    kinds = rng.sample(list(SUMMARY_ASKS), rng.randint(2, 4))
    ask = ", ".join(SUMMARY_ASKS[kind] for kind in kinds)
    rng.shuffle(kinds)
    joint = rng.choice((", ", "; ", " and "))
    link = rng.choice((" ", " ", " is ", ": "))
    noted = joint.join(f"{kind}{link}<{kind}>" for kind in kinds)
    return ask + "[.||, please.]", f"[Noted|I wrote down|So we have|Understood]: {noted}."


def story(rng: random.Random) -> str:
    """Four to seven sentences about two people, two cities and a thing."""
    facts = draw_facts(rng) | {"month": rng.choice(MONTHS)}
    middles = rng.sample(STORY_MIDDLES, rng.randint(2, 5))
    sentences = [rng.choice(STORY_OPENINGS), *middles, rng.choice(STORY_ENDINGS)]
    return " ".join(say(rng, sentence, facts) for sentence in sentences)


def note(rng: random.Random) -> str:
    """What a shop writes down: orders, prices, shelves, routes, returns."""
    facts = draw_facts(rng)
    facts["remark"] = rng.choice(REMARKS)
    facts["shelf"] = f"{rng.choice(THINGS)}_{rng.randint(1, 99)}"
    facts["shelf2"] = f"{rng.choice(QUALITIES)}_{rng.choice(THINGS)}"
    return say(rng, quoted(rng, rng.choice(NOTES)), facts)


def listed(rng: random.Random, items: list[str]) -> str:
    """The items in a row, plain or set off, the same way for each."""
    left, right = rng.choice((("", ""), ("", ""), *QUOTES))
    return rng.choice((", ", " ", "; ")).join(f"{left}{item}{right}" for item in items)


def read_back(rng: random.Random) -> str:
    """A list read out and read back: bare copying, of words, numbers and capitals."""
    pool = [*THINGS, *CITIES, *FIRST_NAMES, *LAST_NAMES, *QUALITIES, *MONTHS]
    items = [
        str(rng.randint(100, 99999)) if rng.random() < 0.4 else rng.choice(pool)
        for _ in range(rng.randint(3, 8))
    ]
    if rng.random() < 0.25:
        capitals = [item.upper() for item in items]
        return f"In capitals: {listed(rng, items)} is {listed(rng, capitals)}."
    opening = rng.choice(("Read back", "List", "Codes", "Spell check", "Repeat after me"))
    again = rng.choice(("Again", "Once more", "I repeat", "Yes"))
    return f"{opening}: {styled(rng, listed(rng, items))}. {again}: {listed(rng, items)}."


#: Kinds of document and their share of the corpus.
KINDS = ((chat, 0.45), (story, 0.25), (note, 0.15), (read_back, 0.15))


def split_of(text: str) -> Split:
    """The part of the corpus that a document belongs to, by its hash: no two parts share a text."""
    bucket = zlib.crc32(text.encode()) % 100
    return "retention" if bucket == 0 else "heldout" if bucket == 1 else "pretrain"


def documents(split: Split, seed: int = 0) -> Iterator[str]:
    """Documents without end, the same for the same seed.

    Chats hold the special tokens of their turns; retention text is plain and holds none.
    """
    rng = random.Random(f"quickstart corpus {seed}")
    makers, shares = zip(*KINDS, strict=True)
    while True:
        text = rng.choices(makers, shares)[0](rng)
        if split_of(text) == split and not (split == "retention" and USER in text):
            yield text
