"""Cases that teach a small model to call tools: other tools than those of the built-in tool cases.

    generate_cases(count, seed)

Each case has a question, the tools that are offered, and the calls of the right answer. Questions
come from phrases with places for values, so that a model learns to copy values into arguments.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Schema = dict[str, Any]
Message = dict[str, Any]
Call = tuple[str, dict[str, Any]]

CITIES = [
    "Lisbon",
    "Oslo",
    "Graz",
    "Quito",
    "Nairobi",
    "Osaka",
    "Lyon",
    "Porto",
    "Bergen",
    "Leeds",
    "Perth",
    "Turin",
    "Lima",
    "Hanoi",
    "Tunis",
    "Bruges",
    "Malmo",
    "Seville",
    "Kyoto",
    "Dakar",
    "New Orleans",
    "Buenos Aires",
    "San Jose",
    "Novi Sad",
]
PEOPLE = [
    "Amira Haddad",
    "Jonas Weber",
    "Li Wen",
    "Pedro Alves",
    "Sofia Rossi",
    "Olga Petrova",
    "Kofi Mensah",
    "Emma Lund",
]
THINGS = [
    "Summer offer",
    "Broken heater",
    "Quarterly plan",
    "Lost badge",
    "New menu",
    "Spring cleaning",
    "Team lunch",
    "Night shift",
    "Paint the fence",
    "Second draft",
]
WORDS = [
    "bridge",
    "candle",
    "harbour",
    "thunder",
    "velvet",
    "pepper",
    "ladder",
    "meadow",
    "anchor",
    "copper",
]
LANGUAGES = ["French", "Spanish", "Polish", "Swedish", "Italian", "Dutch", "Greek", "Turkish"]
ROOMS = ["bedroom", "cellar", "workshop", "balcony", "nursery", "pantry", "lobby", "laundry room"]
SERVICES = ["billing-api", "search-index", "mailer", "auth-proxy", "image-cache", "ledger"]
FOODS = ["rice", "salmon", "lentils", "oats", "cheese", "apples", "almonds", "pasta"]
SPECIALTIES = ["dentist", "cardiologist", "dermatologist", "pediatrician"]


def _code(rng: random.Random) -> str:
    letters = "".join(rng.choices("ABCDEFGHKLMNPRSTVXZ", k=rng.randint(1, 3)))
    return f"{letters}-{rng.randint(10, 9999)}"


def _path(rng: random.Random) -> str:
    folders = rng.sample(["srv", "data", "home", "opt", "logs", "photos", "backup", "reports"], 2)
    return f"/{'/'.join(folders)}{rng.choice(['', '/old', '/2025', '/q3.txt', '/list.csv'])}"


def _email(rng: random.Random) -> str:
    first, last = rng.choice(PEOPLE).lower().split()
    return f"{first}.{last}@{rng.choice(['example.com', 'example.org', 'mail.test'])}"


def _date(rng: random.Random) -> str:
    return f"20{rng.randint(24, 29)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"


@dataclass(frozen=True)
class Slot:
    """A kind of argument: its schema, and how a value is drawn."""

    schema: Schema
    draw: Callable[[random.Random], Any]


def _one_of(values: list[str], description: str) -> Slot:
    return Slot({"type": "string", "description": description}, lambda rng: rng.choice(values))


def _number(low: int, high: int, description: str) -> Slot:
    schema = {"type": "integer", "description": description}
    return Slot(schema, lambda rng: rng.randint(low, high))


SLOTS = {
    "city": _one_of(CITIES, "Name of a city"),
    "origin": _one_of(CITIES, "Where the trip starts"),
    "destination": _one_of(CITIES, "Where the trip ends"),
    "person": _one_of(PEOPLE, "Full name"),
    "title": _one_of(THINGS, "A short title"),
    "word": _one_of(WORDS, "One word"),
    "language": _one_of(LANGUAGES, "Name of a language in English"),
    "room": _one_of(ROOMS, "Name of a room"),
    "service": _one_of(SERVICES, "Name of a service"),
    "food": _one_of(FOODS, "What is eaten"),
    "specialty": _one_of(SPECIALTIES, "The doctor's field"),
    "code": Slot({"type": "string", "description": "Its number, such as AB-12"}, _code),
    "path": Slot({"type": "string", "description": "A full path"}, _path),
    "email": Slot({"type": "string", "description": "An email address"}, _email),
    "date": Slot({"type": "string", "description": "A date, YYYY-MM-DD"}, _date),
    "minutes": _number(2, 90, "Time in minutes"),
    "people": _number(2, 12, "How many people"),
    "grams": _number(20, 900, "Weight in grams"),
    "degrees": _number(80, 250, "Temperature in degrees Celsius"),
    "count": _number(2, 20, "How many"),
    "kilometers": _number(3, 900, "Distance in kilometers"),
    "hours": _number(2, 20, "Time in hours"),
    "radius": Slot(
        {"type": "number", "description": "The radius"},
        lambda rng: round(rng.uniform(0.5, 40), 1),
    ),
    "amount": Slot(
        {"type": "number", "description": "An amount of money"},
        lambda rng: round(rng.uniform(2, 900), 2),
    ),
    "size": Slot(
        {"type": "string", "enum": ["small", "medium", "large"]},
        lambda rng: rng.choice(["small", "medium", "large"]),
    ),
    "role": Slot(
        {"type": "string", "enum": ["viewer", "editor", "owner"]},
        lambda rng: rng.choice(["viewer", "editor", "owner"]),
    ),
    "priority": Slot(
        {"type": "string", "enum": ["low", "normal", "urgent"]},
        lambda rng: rng.choice(["low", "normal", "urgent"]),
    ),
}


@dataclass(frozen=True)
class Action:
    """A tool, and phrases that ask for it.

    A phrase is a text with names of arguments in braces, and arguments that the text implies.
    """

    name: str
    description: str
    arguments: str  # names; "day=date": the argument `day` is a date
    phrases: tuple[str | tuple[str, dict[str, Any]], ...]
    # Arguments that may be left out, with their schemas.
    optional: dict[str, Schema] = field(default_factory=dict)

    @property
    def slots(self) -> dict[str, Slot]:
        """The kinds of the required arguments, by name."""
        found = {}
        for entry in self.arguments.split():
            name, _, kind = entry.partition("=")
            found[name] = SLOTS[kind or name]
        return found

    @property
    def tool(self) -> Schema:
        """The tool as a chat request offers it."""
        slots = self.slots
        properties = {name: slot.schema for name, slot in slots.items()} | self.optional
        parameters = {"type": "object", "properties": properties, "required": list(slots)}
        function = {"name": self.name, "description": self.description, "parameters": parameters}
        return {"type": "function", "function": function}

    def ask(self, rng: random.Random) -> tuple[str, Call]:
        """A question, and the call that it asks for."""
        phrase = rng.choice(self.phrases)
        text, implied = phrase if isinstance(phrase, tuple) else (phrase, {})
        values = {name: slot.draw(rng) for name, slot in self.slots.items() if name not in implied}
        arguments = {name: implied.get(name, values.get(name)) for name in self.slots}
        arguments |= {name: value for name, value in implied.items() if name in self.optional}
        return re.sub(r"\{(\w+)\}", lambda match: str(values[match[1]]), text), (
            self.name,
            arguments,
        )


def _flag(description: str, default: bool = False) -> Schema:
    return {"type": "boolean", "description": description, "default": default}


SLOTS["on"] = Slot({"type": "boolean", "description": "On or off"}, lambda rng: True)

ACTIONS = (
    Action(
        "get_tide_times", "Times of high and low tide.", "harbour=city date",
        ("When is high tide in {harbour} on {date}?", "Tides at {harbour} for {date}, please."),
    ),
    Action(
        "get_pollen_level", "How much pollen is in the air.", "place=city",
        ("How much pollen is there in {place}?", "Is the pollen bad in {place} today?"),
    ),
    Action(
        "find_ferry", "Ferries between two places.", "origin destination date",
        ("Which ferries go from {origin} to {destination} on {date}?",
         "I need a ferry to {destination} from {origin}, leaving on {date}."),
    ),
    Action(
        "open_ticket", "Opens a support ticket.", "title priority",
        ('Open a ticket "{title}" with {priority} priority.',
         'File a {priority} ticket with the title "{title}".'),
    ),
    Action(
        "close_ticket", "Closes a support ticket.", "ticket=code",
        ("Close the ticket {ticket}.", "{ticket} is done, close it."),
    ),
    Action(
        "rename_project", "Gives a project another name.", "project=code new_name=title",
        ('Rename the project {project} to "{new_name}".',
         'Project {project} should be called "{new_name}" from now on.'),
    ),
    Action(
        "remove_tag", "Takes a tag off an item.", "item=code tag=word",
        ('Remove the tag "{tag}" from {item}.', "Take the {tag} tag off item {item}."),
    ),
    Action(
        "average_speed", "Mean speed of a trip.", "kilometers hours",
        ("How fast is {kilometers} kilometers in {hours} hours on average?",
         "We drove {kilometers} km in {hours} hours. What was our mean speed?"),
    ),
    Action(
        "area_of_circle", "The area of a circle.", "radius",
        ("What is the area of a circle with the radius {radius}?",
         "Compute the area of a circle whose radius is {radius}."),
    ),
    Action(
        "book_table", "Books a table in a restaurant.", "restaurant=title people date",
        ('Book a table for {people} at "{restaurant}" on {date}.',
         'On {date} we want to eat at "{restaurant}", {people} people.'),
    ),
    Action(
        "set_oven", "Heats the oven for some time.", "degrees minutes",
        ("Set the oven to {degrees} degrees for {minutes} minutes.",
         "Bake for {minutes} minutes at {degrees} degrees."),
    ),
    Action(
        "set_fan", "Switches a fan.", "room on",
        (("Turn on the fan in the {room}.", {"on": True}),
         ("Switch off the fan in the {room}.", {"on": False}),
         ("The fan in the {room} should stop.", {"on": False})),
    ),
    Action(
        "archive_folder", "Packs a folder into an archive.", "path",
        ("Archive {path}.", ("Archive {path} and delete the original.", {"delete": True})),
        {"delete": _flag("Delete the folder afterwards")},
    ),
    Action(
        "show_permissions", "Who may read and write a file.", "path",
        ("Who may read {path}?", "Show the permissions of {path}."),
    ),
    Action(
        "find_doctor", "Doctors in a city.", "specialty city",
        ("Find a {specialty} in {city}.", "Is there a {specialty} in {city}?",
         ("Which {specialty} in {city} takes new patients?", {"new_patients": True})),
        {"new_patients": _flag("Only those that take new patients")},
    ),
    Action(
        "count_calories", "Calories of some food.", "food grams",
        ("How many calories do {grams} grams of {food} have?", "Calories of {grams} g of {food}?"),
    ),
    Action(
        "order_pizza", "Orders pizzas.", "size count",
        ("Order {count} {size} pizzas.", "We want {count} pizzas, {size} ones."),
    ),
    Action(
        "invite_user", "Invites somebody to the workspace.", "email role",
        ("Invite {email} as {role}.", "Add {email} with the role {role}."),
    ),
    Action(
        "check_stock", "How many pieces of an article are in stock.", "article=code",
        ("Is {article} in stock?", "How many pieces of {article} are left?"),
    ),
    Action(
        "renew_book", "Extends the loan of a book.", "book=code",
        ("Renew the book {book}.", "I need the book {book} longer, please extend it."),
    ),
    Action(
        "pay_invoice", "Pays an invoice.", "invoice=code amount",
        ("Pay {amount} for the invoice {invoice}.", "The invoice {invoice} is {amount}. Pay it."),
    ),
    Action(
        "trace_route", "The way of packets to a host.", "host=service",
        ("Trace the route to {host}.", ("Trace the route to {host} over IPv6.", {"ipv6": True})),
        {"ipv6": _flag("Use IPv6")},
    ),
    Action(
        "start_backup", "Backs up a database.", "database=word",
        ("Back up the database {database}.",
         ("Make a full backup of the database {database}.", {"full": True})),
        {"full": _flag("Everything, not the changes alone")},
    ),
    Action(
        "get_metrics", "Load and errors of a service.", "service minutes",
        ("Show the metrics of {service} for the last {minutes} minutes.",
         "How did {service} do in the past {minutes} minutes?"),
    ),
    Action(
        "stop_service", "Stops a service.", "service",
        ("Stop {service}.", ("Stop {service} at once, without waiting.", {"force": True})),
        {"force": _flag("Do not wait for requests")},
    ),
    Action(
        "translate_word", "One word in another language.", "word language",
        ('What is "{word}" in {language}?', "Translate the word {word} into {language}."),
    ),
    Action(
        "define_word", "What a word means.", "word",
        ('What does "{word}" mean?', "Define {word}."),
    ),
    Action(
        "schedule_call", "Plans a phone call.", "person date minutes",
        ("Plan a call with {person} on {date}, {minutes} minutes long.",
         "{minutes} minutes on the phone with {person} on {date}, please."),
    ),
    Action(
        "water_garden", "Waters the garden.", "minutes",
        ("Water the garden for {minutes} minutes.", "The garden needs water, {minutes} minutes."),
    ),
    Action(
        "find_person", "Data of an employee.", "person",
        ("Which office does {person} have?", "Look up {person}."),
    ),
    Action(
        "assign_task", "Gives a task to somebody.", "task=code person",
        ("Give the task {task} to {person}.", "{person} should do {task}."),
    ),
)  # fmt: skip

# Questions that no tool answers.
OTHERS = (
    ("What is the tallest mountain?", "Mount Everest."),
    ("Write one line about the sea.", "The sea is wide and never still."),
    ("Who wrote the opera Carmen?", "Georges Bizet."),
    ("Thanks, that was helpful!", "You are welcome."),
    ("Hello, how are you?", "Hello! I am fine. How can I help you?"),
    ("What is the opposite of loud?", "Quiet."),
    ("Name three colors.", "Red, blue and green."),
    ("How many legs does a spider have?", "Eight."),
    ("What is the capital of Portugal?", "Lisbon."),
    ("Give me a name for a cat.", "Biscuit."),
    ("Which planet has rings?", "Saturn."),
    ("Explain in one sentence what a noun is.", "A noun names a thing, a person or a place."),
    ("Is a tomato a fruit?", "Yes, it is a fruit."),
    ("Who was the first person on the moon?", "Neil Armstrong."),
    ("What is seven plus five?", "Twelve."),
    ("Why do leaves look green?", "They have a green pigment."),
)


@dataclass(frozen=True)
class TrainingCase:
    """A conversation, the tools that are offered, and the answer: calls, or a text."""

    messages: list[Message]
    tools: list[Schema]
    calls: list[Call]
    text: str = ""


def generate_cases(count: int, seed: int) -> list[TrainingCase]:
    """`count` cases; the same for the same seed."""
    rng = random.Random(seed)
    return [_case(rng) for _ in range(count)]


def _case(rng: random.Random) -> TrainingCase:
    kind = rng.choices(
        ("one", "same twice", "two", "none", "second turn"), weights=(50, 14, 14, 12, 10)
    )[0]
    first, second, *others = rng.sample(ACTIONS, 5)
    others = others[: rng.randint(0, 3)]
    question, call = first.ask(rng)
    if kind == "none":
        question, text = rng.choice(OTHERS)
        return _shuffled(rng, [_user(question)], [first, *others], [], text)
    if kind == "same twice":
        also, other_call = first.ask(rng)
        return _shuffled(rng, [_user(f"{question} {also}")], [first, *others], [call, other_call])
    if kind == "two":
        also, other_call = second.ask(rng)
        link = rng.choice((" ", " And: ", " Then: ", " Also: "))
        messages = [_user(question + link + also)]
        return _shuffled(rng, messages, [first, second, *others], [call, other_call])
    if kind == "second turn":
        before, call_before = first.ask(rng)
        messages = [_user(before), *_done(call_before), _user(question)]
        return _shuffled(rng, messages, [first, *others], [call])
    return _shuffled(rng, [_user(question)], [first, *others], [call])


def _shuffled(
    rng: random.Random,
    messages: list[Message],
    actions: list[Action],
    calls: list[Call],
    text: str = "",
) -> TrainingCase:
    tools = [action.tool for action in actions]
    rng.shuffle(tools)
    return TrainingCase(messages, tools, calls, text)


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _done(call: Call) -> list[Message]:
    """The messages of a call that was answered."""
    name, arguments = call
    function = {"name": name, "arguments": arguments}
    return [
        {"role": "assistant", "content": "", "tool_calls": [{"function": function}]},
        {"role": "tool", "content": '{"status": "ok"}'},
        {"role": "assistant", "content": "It is done."},
    ]
