"""Cases that teach a small model to call tools: other tools than those of the built-in tool cases.

    generate_groups(count, seed)

A group is some questions to the same tools. Questions come from phrases with places for values, so
that a model learns to copy values into arguments. Names of tools and arguments vary from group to
group, so that it learns to read them in the prompt.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

Schema = dict[str, Any]
Message = dict[str, Any]
Call = tuple[str, dict[str, Any]]
# A value as a question writes it, and as the argument has it.
Drawn = tuple[str, Any]
Draw = Callable[[random.Random], Drawn]
# A text with names of arguments in braces, and arguments that the text implies.
Phrase = str | tuple[str, dict[str, Any]]

QUESTIONS = 4  # of a group
MAX_TOOLS = 4  # of a group

# fmt: off
CITIES = [
    "Lisbon", "Graz", "Quito", "Osaka", "Lyon", "Porto", "Bergen", "Leeds", "Perth", "Turin",
    "Lima", "Hanoi", "Tunis", "Bruges", "Malmö", "Kyoto", "Dakar", "New Orleans", "São Paulo",
    "San José", "Novi Sad", "Łódź", "Zürich", "Québec", "Tampere", "Adelaide", "Tbilisi", "Cork",
]
FIRST_NAMES = [
    "Amira", "Jonas", "Li", "Pedro", "Sofia", "Olga", "Kofi", "Emma", "Zoë", "Tariq", "Ines",
    "Mateo", "Freya", "Björn", "Priya", "Hugo", "Noor", "Ravi", "Clara", "Otto",
]
LAST_NAMES = [
    "Haddad", "Weber", "Wen", "Alves", "Rossi", "Petrova", "Mensah", "Lund", "Müller", "Costa",
    "Novak", "Silva", "Tanaka", "Okafor", "Larsen", "Dubois", "Moreau", "Kaya", "Byrne", "Ortega",
]
TITLE_STARTS = [
    "Summer", "Broken", "Quarterly", "Lost", "New", "Spring", "Team", "Night", "Second", "Old",
    "Weekly", "Final", "Green", "Urgent", "Blue", "Early", "Winter", "Shared", "Missing", "Annual",
]
TITLE_ENDS = [
    "offer", "heater", "plan", "badge", "menu", "cleaning", "lunch", "shift", "draft", "invoice",
    "review", "password", "garden", "printer", "report", "budget", "meeting", "window", "key",
]
WORDS = [
    "bridge", "candle", "harbour", "thunder", "velvet", "pepper", "ladder", "meadow", "anchor",
    "copper", "walnut", "lantern", "orchard", "pebble", "saffron", "tulip", "wagon", "amber",
]
LANGUAGES = ["French", "Spanish", "Polish", "Swedish", "Italian", "Dutch", "Greek", "Turkish"]
ROOMS = ["bedroom", "cellar", "workshop", "balcony", "nursery", "pantry", "lobby", "laundry room"]
SERVICES = ["billing-api", "search-index", "mailer", "auth-proxy", "image-cache", "ledger"]
FOODS = ["rice", "salmon", "lentils", "oats", "cheese", "apples", "almonds", "pasta"]
FIELDS = ["age", "stock", "weight", "score", "price_eur", "visits", "year", "length"]
SHEETS = ["guests", "tools", "plants", "rentals", "members", "repairs", "books", "trips"]
FOLDERS = ["srv", "data", "home", "opt", "photos", "backup", "reports", "music", "work"]
FILE_ENDS = ["", "/old", "/2025", "/q3.txt", "/list.csv", "/notes.md", "/main.rs", "/a.toml"]
SENTENCES = [
    "See you on Monday.", "The parcel is at the desk.", "Lunch is at noon.", "I will be late.",
    "Please call me back.", "All tests passed.", "The door is open.", "Ça marche, merci !",
    "Bring the blue folder.", "We leave at six.", "Alles Gute zum Geburtstag!", "¿Vienes mañana?",
]
MONTHS = [
    "January", "February", "March", "April", "May", "June", "July", "August", "September",
    "October", "November", "December",
]
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
# fmt: on


def _code(rng: random.Random) -> Drawn:
    letters = "".join(rng.choices("ABCDEFGHKLMNPRSTVXZ", k=rng.randint(1, 3)))
    separator = rng.choice(("-", "-", "_", ""))
    code = f"{letters}{separator}{rng.randint(10, 9999)}"
    if rng.random() < 0.3:
        code = code.lower()
    return code, code


def _path(rng: random.Random) -> Drawn:
    folders = rng.sample(FOLDERS, rng.randint(1, 2))
    path = f"{rng.choice(('/', '/', ''))}{'/'.join(folders)}{rng.choice(FILE_ENDS)}"
    return path, path


def _person(rng: random.Random) -> Drawn:
    name = f"{rng.choice(FIRST_NAMES)} {rng.choice(LAST_NAMES)}"
    return name, name


def _email(rng: random.Random) -> Drawn:
    first = rng.choice(("amira", "jonas", "pedro", "sofia", "olga", "kofi", "emma", "ravi"))
    name = rng.choice((first, f"{first}.{rng.choice(LAST_NAMES[:8]).lower()}"))
    email = f"{name}@{rng.choice(('example.net', 'mail.test', 'firm.example'))}"
    return email, email


def _title(rng: random.Random) -> Drawn:
    title = f"{rng.choice(TITLE_STARTS)} {rng.choice(TITLE_ENDS)}"
    return f'"{title}"', title


def _sentence(rng: random.Random) -> Drawn:
    text = rng.choice(SENTENCES)
    return f'"{text}"', text


def _date(rng: random.Random) -> Drawn:
    year, month, day = rng.randint(2024, 2029), rng.randint(1, 12), rng.randint(1, 28)
    date = f"{year}-{month:02}-{day:02}"
    return (f"{MONTHS[month - 1]} {day}, {year}" if rng.random() < 0.2 else date), date


def _moment(rng: random.Random) -> Drawn:
    date = f"20{rng.randint(24, 29)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"
    clock = f"{rng.randint(6, 22):02}:{rng.choice((0, 10, 15, 30, 45)):02}"
    return f"{date} at {clock}", f"{date}T{clock}"


def _list_text(texts: Sequence[str]) -> str:
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"


@dataclass(frozen=True)
class Slot:
    """A kind of argument: its schema, how a value is drawn, and other names of such arguments."""

    schema: Schema
    draw: Draw
    names: tuple[str, ...] = ()


def _text(draw: Draw, description: str, *names: str) -> Slot:
    schema = {"type": "string"} | ({"description": description} if description else {})
    return Slot(schema, draw, names)


def _one_of(values: list[str], description: str, *names: str) -> Slot:
    def draw(rng: random.Random) -> Drawn:
        value = rng.choice(values)
        return value, value

    return _text(draw, description, *names)


def _enum(*values: str) -> Slot:
    def draw(rng: random.Random) -> Drawn:
        value = rng.choice(values)
        return value.replace("_", " "), value

    return Slot({"type": "string", "enum": list(values)}, draw)


def _number(low: int, high: int, description: str, *names: str) -> Slot:
    def draw(rng: random.Random) -> Drawn:
        value = rng.randint(low, high)
        in_words = value < len(NUMBERS) and rng.random() < 0.3
        return (NUMBERS[value] if in_words else str(value)), value

    return Slot({"type": "integer", "description": description}, draw, names)


def _decimal(low: float, high: float, digits: int, description: str, *names: str) -> Slot:
    def draw(rng: random.Random) -> Drawn:
        value = round(rng.uniform(low, high), rng.randint(0, digits))
        whole = int(value) if value == int(value) else value
        return str(whole), whole

    return Slot({"type": "number", "description": description}, draw, names)


def _list_of(slot: Slot, description: str, *names: str) -> Slot:
    def draw(rng: random.Random) -> Drawn:
        drawn = [slot.draw(rng) for _ in range(rng.randint(1, 3))]
        unique = list(dict(drawn).items())
        return _list_text([text for text, _ in unique]), [value for _, value in unique]

    items = {"type": slot.schema["type"]}
    return Slot({"type": "array", "items": items, "description": description}, draw, names)


def _object(properties: dict[str, Slot], text: str) -> Slot:
    """An object. text: how a question writes it, with names of properties in braces."""

    def draw(rng: random.Random) -> Drawn:
        drawn = {name: slot.draw(rng) for name, slot in properties.items()}
        values = {name: value for name, (_, value) in drawn.items()}
        return text.format(**{name: written for name, (written, _) in drawn.items()}), values

    schemas = {name: slot.schema for name, slot in properties.items()}
    return Slot({"type": "object", "properties": schemas, "required": list(properties)}, draw)


def _objects(slot: Slot, description: str) -> Slot:
    def draw(rng: random.Random) -> Drawn:
        drawn = [slot.draw(rng) for _ in range(rng.randint(1, 2))]
        return _list_text([text for text, _ in drawn]), [value for _, value in drawn]

    return Slot({"type": "array", "items": slot.schema, "description": description}, draw)


def _filter(rng: random.Random) -> Drawn:
    name, value = rng.choice(FIELDS), rng.randint(2, 90)
    words, operator = rng.choice(
        (("is", "="), ("is greater than", ">"), ("is less than", "<"), ("is at least", ">="))
    )
    return f"{name} {words} {value}", {"field": name, "op": operator, "value": value}


def _record(rng: random.Random) -> Drawn:
    values: dict[str, Any] = {"name": rng.choice(WORDS)}
    values |= {name: rng.randint(2, 90) for name in rng.sample(FIELDS, rng.randint(1, 2))}
    return ", ".join(f"{name} {value}" for name, value in values.items()), values


def _pairs(rng: random.Random) -> Drawn:
    values = {word: rng.randint(2, 90) for word in rng.sample(WORDS, rng.randint(2, 3))}
    texts = [f"{label} {value}" for label, value in values.items()]
    return ", ".join(texts), [{"name": label, "amount": n} for label, n in values.items()]


def _points(rng: random.Random) -> Drawn:
    points = [[rng.randint(0, 20), rng.randint(0, 20)] for _ in range(rng.randint(2, 3))]
    return _list_text([str(tuple(point)) for point in points]), points


_FILTER_SCHEMA = {
    "type": "object",
    "properties": {
        "field": {"type": "string"},
        "op": {"type": "string", "enum": ["=", "!=", "<", "<=", ">", ">="]},
        "value": {},
    },
    "required": ["field", "op", "value"],
}
_PAIR_SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "amount": {"type": "number"}},
    "required": ["name", "amount"],
}
_CODE = _text(_code, "Its number, such as AB-12", "number", "reference", "ref", "key")
_COUNT = _number(2, 20, "How many", "amount", "num", "pieces")
_STREET = _one_of(["Mill Road 4", "Harbour Street 12", "Elm Way 7", "Rue Verte 3"], "Street")
_CITY = _one_of(CITIES, "Name of a city", "town", "place", "location", "city_name")

SLOTS = {
    "city": _CITY,
    "origin": _one_of(CITIES, "Where the trip starts", "start", "from_city", "departure"),
    "destination": _one_of(CITIES, "Where the trip ends", "end", "to_city", "arrival"),
    "person": _text(_person, "Full name", "name", "full_name", "employee", "who"),
    "title": _text(_title, "A short title", "name", "label", "heading"),
    "text": _text(_sentence, "The text", "message", "content", "words"),
    "word": _one_of(WORDS, "One word", "term", "name", "entry"),
    "language": _one_of(LANGUAGES, "Name of a language in English", "to_language", "tongue"),
    "room": _one_of(ROOMS, "Name of a room", "where", "room_name", "area"),
    "service": _one_of(SERVICES, "Name of a service", "service_name", "app", "job"),
    "food": _one_of(FOODS, "What is eaten", "ingredient", "product"),
    "specialty": _one_of(["dentist", "cardiologist", "optician"], "The doctor's field", "field"),
    "code": _CODE,
    "path": _text(_path, "A path", "file", "folder", "filename", "location"),
    "email": _text(_email, "An email address", "address", "mail", "recipient"),
    "date": _text(_date, "A date, YYYY-MM-DD", "day", "on_date", "when"),
    "until": _text(_date, "Last date, YYYY-MM-DD", "end_day", "last_day", "to_date"),
    "moment": _text(_moment, "Date and time, YYYY-MM-DDTHH:MM", "begin", "date_time", "time"),
    "minutes": _number(2, 90, "Time in minutes", "duration", "length_minutes", "for_minutes"),
    "people": _number(2, 12, "How many people", "persons", "party_size", "seats"),
    "grams": _number(20, 900, "Weight in grams", "weight", "weight_grams"),
    "degrees": _number(80, 250, "Temperature in degrees Celsius", "temperature", "heat"),
    "percent": _number(5, 95, "A share in percent", "level", "share"),
    "count": _COUNT,
    "limit": _number(2, 30, "At most how many", "maximum", "max_results", "top"),
    "number": _number(100, 9999, "Its number", "job_id", "ticket_number"),
    "kilometers": _number(3, 900, "Distance in kilometers", "distance", "km"),
    "hours": _number(2, 20, "Time in hours", "duration_hours", "time_hours"),
    "radius": _decimal(0.5, 40, 1, "The radius", "r", "radius_m"),
    "amount": _decimal(2, 900, 2, "An amount of money", "price", "sum", "value"),
    "size": _enum("small", "medium", "large"),
    "role": _enum("viewer", "editor", "owner"),
    "priority": _enum("low", "normal", "urgent"),
    "order": _enum("newest", "oldest", "cheapest"),
    "vehicle": _enum("bus", "tram", "cable_car"),
    "paper": _enum("a4", "a3", "letter"),
    "switch": Slot({"type": "boolean", "description": "On or off"}, lambda rng: ("on", True)),
    "flag": Slot({"type": "boolean", "default": False}, lambda rng: ("yes", True)),
    "emails": _list_of(_text(_email, ""), "Email addresses", "guests", "recipients"),
    "words": _list_of(_one_of(WORDS, ""), "Words", "tags", "keywords"),
    "codes": _list_of(_text(_code, ""), "Their numbers", "items", "references"),
    "numbers": _list_of(_number(2, 300, ""), "The numbers", "values", "data"),
    "fields": _list_of(_one_of(FIELDS, ""), "Names of fields", "show", "attributes"),
    "sheet": _one_of(SHEETS, "Name of a sheet", "sheet_name", "source", "list"),
    "filters": Slot(
        {"type": "array", "items": _FILTER_SCHEMA, "description": "All must hold"},
        lambda rng: (lambda text, value: (text, [value]))(*_filter(rng)),
        ("conditions", "criteria"),
    ),
    "record": Slot({"type": "object", "description": "Its fields"}, _record, ("entry", "values")),
    "pairs": Slot(
        {"type": "array", "items": _PAIR_SCHEMA, "description": "Parts"}, _pairs, ("parts", "bars")
    ),
    "points": Slot(
        {"type": "array", "items": {"type": "array", "items": {"type": "number"}}},
        _points,
        ("corners", "coordinates"),
    ),
    "lines": _objects(
        _object({"article": _CODE, "count": _COUNT}, "{count} pieces of {article}"), "Articles"
    ),
    "address": _object(
        {"name": _text(_person, ""), "street": _STREET, "city": _CITY}, "{name}, {street}, {city}"
    ),
    "window": _object({"from": _text(_date, ""), "to": _text(_date, "")}, "from {from} to {to}"),
}


@dataclass(frozen=True)
class Action:
    """A tool under its plain names, and phrases that ask for it."""

    name: str
    description: str
    arguments: str  # names; "day=date": `day` is a date; "day?=date": it may be left out
    phrases: tuple[Phrase, ...]
    notes: dict[str, str] = field(default_factory=dict)  # descriptions of arguments
    result: str = "status"  # what a call returns

    @property
    def slots(self) -> dict[str, tuple[Slot, bool]]:
        """By name: the kind of an argument, and whether it is required."""
        found = {}
        for entry in self.arguments.split():
            left, _, kind = entry.partition("=")
            name = left.removesuffix("?")
            found[name] = (SLOTS[kind or name], left == name)
        return found


# fmt: off
ACTIONS = (
    Action("get_tide_times", "Times of high and low tide.", "harbour=city date",
        ("When is high tide in {harbour} on {date}?", "Tides at {harbour} for {date}, please.",
         "Quand est la marée haute à {harbour} le {date} ?")),
    Action("get_pollen_level", "How much pollen is in the air.", "place=city",
        ("How much pollen is there in {place}?", "Is the pollen bad in {place} today?",
         "Wie stark ist der Pollenflug in {place}?")),
    Action("find_ferry", "Ferries between two places.", "origin destination date seats?=people",
        ("Which ferries go from {origin} to {destination} on {date}?",
         "I need a ferry to {destination} from {origin}, leaving on {date}.",
         "Ferries from {origin} to {destination} on {date} for {seats} people, please."),
        {"seats": "Passengers; the default is 1"}, "departure"),
    Action("open_ticket", "Opens a support ticket.", "title priority?",
        ("Open a ticket {title} with {priority} priority.", "Open a ticket with the title {title}.",
         "File a {priority} ticket with the title {title}.")),
    Action("find_ticket", "Finds a support ticket by its title.", "title",
        ("Which number does the ticket {title} have?", "Find the ticket {title}."), {}, "ticket"),
    Action("close_ticket", "Closes a support ticket.", "ticket=code",
        ("Close the ticket {ticket}.", "{ticket} is done, close it.")),
    Action("rename_project", "Gives a project another name.", "project=code new_name=title",
        ("Rename the project {project} to {new_name}.",
         "Project {project} should be called {new_name} from now on.")),
    Action("remove_tag", "Takes a tag off an item.", "item=code tag=word",
        ('Remove the tag "{tag}" from {item}.', "Take the {tag} tag off item {item}.")),
    Action("average_speed", "Mean speed of a trip.", "kilometers hours",
        ("How fast is {kilometers} kilometers in {hours} hours on average?",
         "We drove {kilometers} km in {hours} hours. What was our mean speed?"), {}, "km_per_hour"),
    Action("area_of_circle", "The area of a circle.", "radius",
        ("What is the area of a circle with the radius {radius}?",
         "Compute the area of a circle whose radius is {radius}."), {}, "area"),
    Action("book_table", "Books a table in a restaurant.",
        "restaurant=title people date outside?=flag",
        ("Book a table for {people} at {restaurant} on {date}.",
         "On {date} we want to eat at {restaurant}, {people} people.",
         ("A table outside for {people} at {restaurant} on {date}.", {"outside": True})),
        {"outside": "A table in the open air"}),
    Action("set_oven", "Heats the oven for some time.", "degrees minutes",
        ("Set the oven to {degrees} degrees for {minutes} minutes.",
         "Bake for {minutes} minutes at {degrees} degrees.")),
    Action("set_fan", "Switches a fan.", "room on=switch",
        (("Turn on the fan in the {room}.", {"on": True}),
         ("Switch off the fan in the {room}.", {"on": False}),
         ("The fan in the {room} should stop.", {"on": False}))),
    Action("archive_folder", "Packs a folder into an archive.", "path delete?=flag",
        ("Archive {path}.", ("Archive {path} and delete the original.", {"delete": True})),
        {"delete": "Delete the folder afterwards"}),
    Action("show_permissions", "Who may read and write a file.", "path",
        ("Who may read {path}?", "Show the permissions of {path}."), {}, "owner"),
    Action("find_doctor", "Doctors in a city.", "specialty city new_patients?=flag",
        ("Find a {specialty} in {city}.", "Is there a {specialty} in {city}?",
         ("Which {specialty} in {city} takes new patients?", {"new_patients": True}),
         "Suche einen {specialty} in {city}."),
        {"new_patients": "Only those that take new patients"}, "doctor"),
    Action("count_calories", "Calories of some food.", "food grams",
        ("How many calories do {grams} grams of {food} have?", "Calories of {grams} g of {food}?"),
        {}, "calories"),
    Action("order_pizza", "Orders pizzas.", "size count",
        ("Order {count} {size} pizzas.", "We want {count} pizzas, {size} ones.")),
    Action("invite_user", "Invites somebody to the workspace.", "email role",
        ("Invite {email} as {role}.", "Add {email} with the role {role}.")),
    Action("check_stock", "How many pieces of an article are in stock.", "article=code",
        ("Is {article} in stock?", "How many pieces of {article} are left?"), {}, "pieces"),
    Action("renew_book", "Extends the loan of a book.", "book=code",
        ("Renew the book {book}.", "I need the book {book} longer, please extend it.")),
    Action("pay_invoice", "Pays an invoice.", "invoice=code amount",
        ("Pay {amount} for the invoice {invoice}.", "The invoice {invoice} is {amount}. Pay it.")),
    Action("trace_route", "The way of packets to a host.", "host=service ipv6?=flag hops?=limit",
        ("Trace the route to {host}.", ("Trace the route to {host} over IPv6.", {"ipv6": True}),
         "Trace the route to {host}, {hops} hops at most."),
        {"ipv6": "Use IPv6", "hops": "At most; the default is 30"}),
    Action("start_backup", "Backs up a database.", "database=word full?=flag",
        ("Back up the database {database}.",
         ("Make a full backup of the database {database}.", {"full": True})),
        {"full": "Everything, not the changes alone"}),
    Action("get_metrics", "Load and errors of a service.", "service minutes",
        ("Show the metrics of {service} for the last {minutes} minutes.",
         "How did {service} do in the past {minutes} minutes?")),
    Action("stop_service", "Stops a service.", "service force?=flag",
        ("Stop {service}.", ("Stop {service} at once, without waiting.", {"force": True})),
        {"force": "Do not wait for requests"}),
    Action("translate_word", "One word in another language.", "word language",
        ('What is "{word}" in {language}?', "Translate the word {word} into {language}."), {},
        "translation"),
    Action("define_word", "What a word means.", "word",
        ('What does "{word}" mean?', "Define {word}."), {}, "meaning"),
    Action("schedule_call", "Plans a phone call.", "person start=moment minutes",
        ("Plan a call with {person} on {start}, {minutes} minutes long.",
         "{minutes} minutes on the phone with {person} on {start}, please.")),
    Action("water_garden", "Waters the garden.", "minutes",
        ("Water the garden for {minutes} minutes.", "The garden needs water, {minutes} minutes.")),
    Action("find_person", "Data of an employee.", "person",
        ("Which office does {person} have?", "Look up {person}."), {}, "office"),
    Action("find_address", "The email address of a person.", "person",
        ("Which email address does {person} have?", "I need the email address of {person}."), {},
        "email"),
    Action("assign_task", "Gives a task to somebody.", "task=code person",
        ("Give the task {task} to {person}.", "{person} should do {task}.")),
    Action("find_task", "The number of a task.", "title",
        ("Which number does the task {title} have?", "Find the task {title}."), {}, "task"),
    Action("post_note", "Pins a note to a board.", "board=word text pinned?=flag",
        ("Post {text} on the board {board}.", "Put a note on the {board} board: {text}",
         ("Post {text} on the board {board}, and pin it.", {"pinned": True})),
        {"board": "Name of the board", "pinned": "Keep it at the top"}),
    Action("mail_guests", "Writes to guests.", "guests=emails subject=title text",
        ("Write to {guests}. Subject: {subject}. Text: {text}",
         "Mail {guests} with the subject {subject} and the text {text}")),
    Action("plan_visit", "Plans a visit.", "title start=moment hours?",
        ("Plan a visit {title} on {start}.", "A visit {title} on {start}, {hours} hours long.",
         "Trage am {start} einen Besuch {title} ein.")),
    Action("list_holidays", "Holidays of a place between two dates.", "city first=date last=until",
        ("Which holidays are there in {city} between {first} and {last}?",
         "Holidays in {city} from {first} to {last}.")),
    Action("cancel_job", "Cancels a print job.", "job=number",
        ("Cancel the print job {job}.", "Print job {job} is a mistake, cancel it.")),
    Action("print_file", "Prints a file.", "path copies?=count paper? both_sides?=flag",
        ("Print {path}.", "Print {copies} copies of {path}.", "Print {path} on {paper} paper.",
         ("Print {path} on both sides.", {"both_sides": True})),
        {"copies": "The default is 1"}),
    Action("list_songs", "Songs of a collection.", "collection=word order? limit?",
        ("Which songs are in {collection}?", "Show the {limit} {order} songs of {collection}.",
         "List {limit} songs of the collection {collection}.")),
    Action("search_sheet", "Finds rows of a sheet.",
        "sheet filters fields?=fields limit?",
        ("In the sheet {sheet}, find the rows where {filters}.",
         "Rows of the sheet {sheet} whose {filters}, {limit} at most.",
         "Show the fields {fields} of the sheet {sheet} where {filters}."),
        {"fields": "All without it"}),
    Action("sum_sheet", "Adds a field of a sheet.", "sheet filters",
        ("How much is it in all in the sheet {sheet} where {filters}?",
         "Add up the sheet {sheet}, only where {filters}."), {}, "total"),
    Action("add_record", "Adds a row to a sheet.", "sheet record",
        ("Add to the sheet {sheet}: {record}.", "A new row of the sheet {sheet}: {record}.")),
    Action("ship_articles", "Ships articles.", "lines to=address fast?=flag",
        ("Ship {lines} to {to}.", ("Ship {lines} to {to}, as fast as possible.", {"fast": True}))),
    Action("reserve_articles", "Puts articles aside.", "lines customer=person",
        ("Put aside {lines} for {customer}.", "Reserve {lines} for {customer}.")),
    Action("draw_bars", "Draws a diagram.", "title pairs",
        ("Draw a diagram {title}: {pairs}.", "Bars with the title {title} for {pairs}.")),
    Action("polygon_area", "The area of a polygon.", "points",
        ("What is the area of the polygon {points}?", "Area of {points}, please."), {}, "area"),
    Action("median_of", "The median of numbers.", "numbers",
        ("What is the median of {numbers}?", "Median: {numbers}."), {}, "median"),
    Action("merge_tags", "Merges tags into one.", "words into=word",
        ('Merge the tags {words} into "{into}".', "The tags {words} should all be {into}.")),
    Action("rent_boat", "Rents a boat.", "city window people",
        ("Rent a boat in {city} {window} for {people} people.",
         "For {people} people: a boat in {city}, {window}.")),
    Action("next_ride", "The next bus or tram.", "stop=title vehicle?",
        ("When does the next {vehicle} leave at {stop}?", "What leaves next at {stop}?")),
    Action("dim_screen", "Sets the brightness of a screen.", "percent",
        ("Dim the screen to {percent} percent.", "Screen brightness: {percent} %.")),
    Action("lend_tools", "Lends tools to somebody.", "codes person until?",
        ("Lend {codes} to {person}.", "{person} takes {codes} until {until}.")),
)

# The first tool finds what the second one needs; the question has the arguments of both.
CHAINS = (
    ("find_ticket", "close_ticket", "ticket", "Close the ticket with the title {title}."),
    ("find_task", "assign_task", "task", "Give the task {title} to {person}."),
    ("find_address", "invite_user", "email", "Invite {person} as {role}."),
    ("find_task", "remove_tag", "item", 'Remove the tag "{tag}" from the task {title}.'),
    ("find_ticket", "rename_project", "project", "Rename the project of {title} to {new_name}."),
)

# Questions that no tool answers.
OTHERS = (
    ("What is the tallest mountain?", "Mount Everest."),
    ("Write one line about the sea.", "The sea is wide and never still."),
    ("Who wrote the opera Carmen?", "Georges Bizet."),
    ("Thanks, that was nice!", "You are welcome."),
    ("Hello, how are you?", "Hello! I am fine. How can I help you?"),
    ("What is the opposite of loud?", "Quiet."),
    ("Name three colors.", "Red, blue and green."),
    ("How many legs does a spider have?", "Eight."),
    ("What is the capital of Portugal?", "Lisbon."),
    ("Give me a name for a boat.", "Marigold."),
    ("Which planet has rings?", "Saturn."),
    ("Explain in one sentence what a noun is.", "A noun names a thing, a person or a place."),
    ("Is a tomato a fruit?", "Yes, it is a fruit."),
    ("Who was the first person on the moon?", "Neil Armstrong."),
    ("What is seven plus five?", "Twelve."),
    ("Why do leaves look green?", "They have a green pigment."),
    ("What does the abbreviation CPU mean?", "Central processing unit."),
    ("Wer hat die Zauberflöte komponiert?", "Wolfgang Amadeus Mozart."),
    ("Tell me a short joke.", "Why did the sheep cross the road? To see the baa-rber."),
    ("Which animals lay eggs?", "Birds, most reptiles, fish and insects do."),
    ("Good morning!", "Good morning! What can I do for you?"),
    ("How do magnets work?", "Their fields attract or repel each other."),
    ("Who painted the Night Watch?", "Rembrandt."),
    ("Is seven a prime number?", "Yes, it has no other divisors than one and itself."),
)
VERBS = {
    "get": ("show", "fetch", "query"), "find": ("locate", "look_up"), "open": ("file", "raise"),
    "close": ("finish", "resolve"), "set": ("adjust", "change"), "book": ("reserve",),
    "show": ("view", "inspect"), "order": ("buy",), "check": ("get", "query"), "stop": ("halt",),
    "start": ("begin", "launch"), "add": ("append", "store"), "plan": ("arrange", "enter"),
    "post": ("pin", "publish"), "list": ("show", "all"), "cancel": ("abort",), "ship": ("deliver",),
    "draw": ("plot",), "assign": ("give",), "search": ("filter",), "remove": ("drop", "detach"),
}
# fmt: on


@dataclass(frozen=True)
class TrainingCase:
    """A conversation, the tools that are offered, and the answer: calls, or a text."""

    messages: list[Message]
    tools: list[Schema]
    calls: list[Call]
    text: str = ""


@dataclass(frozen=True)
class Offer:
    """An action as the prompts of a group offer it."""

    action: Action
    name: str
    names: dict[str, str]  # of its arguments, by their plain names

    @staticmethod
    def of(action: Action, rng: random.Random) -> Offer:
        """The action under plain or other names."""
        verb, _, rest = action.name.partition("_")
        verb = rng.choice((verb, *VERBS.get(verb, ())))
        names: dict[str, str] = {}
        for name, (slot, _) in action.slots.items():
            other = rng.choice(slot.names) if slot.names and rng.random() < 0.5 else name
            is_taken = other in names.values() or other in action.slots
            names[name] = name if is_taken else other
        return Offer(action, f"{verb}_{rest}", names)

    @property
    def tool(self) -> Schema:
        """The tool as a chat request offers it."""
        slots = self.action.slots
        properties = {}
        for name, (slot, _) in slots.items():
            note = self.action.notes.get(name)
            properties[self.names[name]] = slot.schema | ({"description": note} if note else {})
        required = [self.names[name] for name, (_, is_required) in slots.items() if is_required]
        parameters = {"type": "object", "properties": properties, "required": required}
        description = self.action.description
        function = {"name": self.name, "description": description, "parameters": parameters}
        return {"type": "function", "function": function}

    def call(self, values: dict[str, Any]) -> Call:
        """The call with these arguments by their plain names, in the order of the schema."""
        return self.name, {self.names[name]: values[name] for name in self.names if name in values}

    def ask(self, rng: random.Random, most: int = 1) -> tuple[str, list[Call]]:
        """A question, and the calls that it asks for: `most` at most, which differ in one value."""
        phrase = rng.choice(self.action.phrases)
        text, implied = phrase if isinstance(phrase, tuple) else (phrase, {})
        slots = {name: self.action.slots[name][0] for name in re.findall(r"\{(\w+)\}", text)}
        drawn = {name: [slot.draw(rng)] for name, slot in slots.items()}
        several = [
            name for name, slot in slots.items() if slot.schema["type"] in ("string", "integer")
        ]
        if most > 1 and several:
            name = rng.choice(several)
            drawn[name] = list(dict(slots[name].draw(rng) for _ in range(most)).items())
        texts = {name: _list_text([entry[0] for entry in found]) for name, found in drawn.items()}
        calls = []
        for i in range(max(map(len, drawn.values()))):
            values = {name: found[min(i, len(found) - 1)][1] for name, found in drawn.items()}
            calls.append(self.call(values | implied))
        return re.sub(r"\{(\w+)\}", lambda match: texts[match[1]], text), calls


def generate_groups(count: int, seed: int) -> list[list[TrainingCase]]:
    """`count` groups of QUESTIONS cases that share tools; the same for the same seed."""
    rng = random.Random(seed)
    return [_group(rng) for _ in range(count)]


def _group(rng: random.Random) -> list[TrainingCase]:
    chain = rng.choice(CHAINS) if rng.random() < 0.3 else None
    by_name = {action.name: action for action in ACTIONS}
    chosen = [by_name[name] for name in chain[:2]] if chain else []
    size = rng.choices(range(1, MAX_TOOLS + 1), weights=(35, 30, 25, 10))[0]
    others = rng.sample(ACTIONS, MAX_TOOLS)
    chosen += [action for action in others if action not in chosen][: max(0, size - len(chosen))]
    offers = {action.name: Offer.of(action, rng) for action in chosen}
    tools = [offer.tool for offer in offers.values()]
    rng.shuffle(tools)
    cases = []
    if chain:
        first, second = (offers[name] for name in chain[:2])
        cases += [
            TrainingCase(messages, tools, [call])
            for messages, call in _chain_steps(rng, first, second, chain[2], chain[3])
        ]
    while len(cases) < QUESTIONS:
        cases.append(_case(rng, list(offers.values()), tools))
    return cases


def _chain_steps(
    rng: random.Random, first: Offer, second: Offer, link: str, text: str
) -> list[tuple[list[Message], Call]]:
    """The conversation before the first call and before the second one."""
    slots = {**second.action.slots, **first.action.slots}
    drawn = {name: slots[name][0].draw(rng) for name in re.findall(r"\{(\w+)\}", text)}
    question = _user(re.sub(r"\{(\w+)\}", lambda match: drawn[match[1]][0], text))
    values = {name: value for name, (_, value) in drawn.items()}
    found = second.action.slots[link][0].draw(rng)[1]
    first_call = first.call(values)
    result = {first.action.result: found}
    second_call = second.call(values | {link: found})
    return [([question], first_call), ([question, *_answered(first_call, result)], second_call)]


def _case(rng: random.Random, offers: list[Offer], tools: list[Schema]) -> TrainingCase:
    kinds = ("one", "several", "two", "none", "second turn", "answered")
    kind = rng.choices(kinds, weights=(46, 16, 14, 10, 8, 6))[0]
    offer, *others = rng.sample(offers, len(offers))
    if kind == "none":
        question, text = rng.choice(OTHERS)
        return TrainingCase([_user(question)], tools, [], text)
    if kind == "several" or (kind == "two" and not others):
        question, calls = offer.ask(rng, rng.randint(2, 3))
        return TrainingCase([_user(question)], tools, calls)
    question, calls = offer.ask(rng)
    if kind == "two":
        also, other_calls = others[0].ask(rng)
        link = rng.choice((" ", " And: ", " Then: ", " Also: "))
        return TrainingCase([_user(question + link + also)], tools, [*calls, *other_calls])
    if kind == "one":
        return TrainingCase([_user(question)], tools, calls)
    number = rng.randint(3, 99)
    is_done = offer.action.result == "status"
    result = {offer.action.result: "ok" if is_done else number}
    text = "It is done." if is_done else f"The answer is {number}."
    messages = [_user(question), *_answered(calls[0], result)]
    if kind == "answered":
        return TrainingCase(messages, tools, [], text)
    after, after_calls = rng.choice(offers).ask(rng)
    messages += [{"role": "assistant", "content": text}, _user(after)]
    return TrainingCase(messages, tools, after_calls)


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _answered(call: Call, result: dict[str, Any]) -> list[Message]:
    """The messages of a call and of its result."""
    name, arguments = call
    function = {"name": name, "arguments": arguments}
    return [
        {"role": "assistant", "content": "", "tool_calls": [{"function": function}]},
        {"role": "tool", "content": json.dumps(result)},
    ]
