"""How needles, questions and near misses are worded: a row in this table each.

All sentences of a wording are in its language. Cities and numbers are as they are in English.
"""

from __future__ import annotations

from dataclasses import dataclass

from gemtool.errors import UsageError, did_you_mean

CITIES = (
    "Accra Amsterdam Ankara Antwerp Athens Baghdad Baku Bangkok Barcelona Beirut Belgrade Berlin "
    "Bogota Boston Bristol Brussels Bucharest Budapest Cairo Calcutta Caracas Chicago Cologne "
    "Copenhagen Dakar Damascus Delhi Denver Dublin Edinburgh Florence Geneva Glasgow Hamburg "
    "Hanoi Havana Helsinki Houston Istanbul Jakarta Jerusalem Kabul Kiev Kingston Krakow Lagos "
    "Leipzig Lima Lisbon London Madrid Manila Marseille Melbourne Memphis Milan Montreal Moscow "
    "Mumbai Munich Nairobi Naples Nice Odessa Osaka Oslo Ottawa Oxford Palermo Paris Perth Prague "
    "Quebec Quito Riga Rome Rotterdam Santiago Seattle Seoul Seville Shanghai Singapore Sofia "
    "Stockholm Sydney Tallinn Tbilisi Tehran Tokyo Toronto Tunis Turin Valencia Venice Vienna "
    "Warsaw Wellington York Zagreb Zurich"
).split()


@dataclass(frozen=True)
class Wording:
    """Templates with {city}, and {number} where a sentence tells one."""

    needle: str
    """What is hidden. The number is the last thing in it."""
    questions: tuple[str, ...]
    """For the number of a city; a case draws one."""
    questions_for_all: tuple[str, ...]
    """For all numbers of a city that has several."""
    prefix_for_all: str
    """How the answer to such a question begins."""
    near_misses: tuple[str, ...]
    """The needle with something in it changed, so that its number is no answer."""
    beginning: int = 64
    """Tokens that the model may say before the first number when its turn is not begun for it."""

    @property
    def prefix(self) -> str:
        """How the answer begins: the needle up to its number."""
        return self.needle.partition("{number}")[0].rstrip()


NEEDLE = "The special magic {city} number is: {number}."
PREFIX_FOR_ALL = "The special magic {city} numbers are:"
# None of these, nor of the paraphrases, is in a training document of examples/.
NEAR_MISSES = (
    "The special magic {city} password is: {number}.",
    "The special secret {city} number is: {number}.",
    "The common magic {city} number is: {number}.",
    "The special magic {city} number is not: {number}.",
    "The special magic {city} airport number is: {number}.",
)

WORDINGS = {
    "report": Wording(
        needle=NEEDLE,
        questions=("What is the special magic {city} number?",),
        questions_for_all=("What are all the special magic {city} numbers?",),
        prefix_for_all=PREFIX_FOR_ALL,
        near_misses=NEAR_MISSES,
        beginning=24,
    ),
    "paraphrased": Wording(
        needle=NEEDLE,
        questions=(
            "Which special magic number belongs to {city}?",
            "What number did the text give as the special magic one for {city}?",
            "For {city}, what is the special magic number?",
            "Could you tell me {city}'s special magic number?",
            "Please state the number that is called special and magic for {city}.",
            "The text names a special magic number for {city}; which one?",
            "I forgot the special magic number of {city}. Can you remind me?",
            "Look up the special magic number that goes with {city}.",
            "Somewhere above, {city} is given a special magic number. Please repeat it.",
            "How does the special magic number for {city} read?",
        ),
        questions_for_all=(
            "Which special magic numbers belong to {city}?",
            "What numbers did the text give as special magic ones for {city}? Name them all.",
            "For {city}, what are the special magic numbers?",
            "Could you tell me all of {city}'s special magic numbers?",
            "The text names several special magic numbers for {city}; which ones?",
            "I forgot the special magic numbers of {city}. Can you remind me of each?",
            "Look up every special magic number that goes with {city}.",
            "How do all the special magic numbers for {city} read?",
        ),
        prefix_for_all=PREFIX_FOR_ALL,
        near_misses=NEAR_MISSES,
    ),
    "german": Wording(
        needle="Die besondere magische Zahl von {city} lautet: {number}.",
        questions=("Wie lautet die besondere magische Zahl von {city}?",),
        questions_for_all=("Wie lauten alle besonderen magischen Zahlen von {city}?",),
        prefix_for_all="Die besonderen magischen Zahlen von {city} lauten:",
        near_misses=(
            "Die besondere magische Losung von {city} lautet: {number}.",
            "Die besondere geheime Zahl von {city} lautet: {number}.",
            "Die gewöhnliche magische Zahl von {city} lautet: {number}.",
            "Die besondere magische Zahl von {city} lautet nicht: {number}.",
            "Die besondere magische Zahl des Flughafens von {city} lautet: {number}.",
        ),
    ),
    "french": Wording(
        # "pour": before some cities "de" would be "d'".
        needle="Le nombre magique spécial pour {city} est : {number}.",
        questions=("Quel est le nombre magique spécial pour {city} ?",),
        questions_for_all=("Quels sont tous les nombres magiques spéciaux pour {city} ?",),
        prefix_for_all="Les nombres magiques spéciaux pour {city} sont :",
        near_misses=(
            "Le code magique spécial pour {city} est : {number}.",
            "Le nombre secret spécial pour {city} est : {number}.",
            "Le nombre magique ordinaire pour {city} est : {number}.",
            "Le nombre magique spécial pour {city} n'est pas : {number}.",
            "Le nombre magique spécial pour {city}-Ouest est : {number}.",
        ),
    ),
    "spanish": Wording(
        needle="El número mágico especial de {city} es: {number}.",
        questions=("¿Cuál es el número mágico especial de {city}?",),
        questions_for_all=("¿Cuáles son todos los números mágicos especiales de {city}?",),
        prefix_for_all="Los números mágicos especiales de {city} son:",
        near_misses=(
            "El código mágico especial de {city} es: {number}.",
            "El número secreto especial de {city} es: {number}.",
            "El número mágico habitual de {city} es: {number}.",
            "El número mágico especial de {city} no es: {number}.",
            "El número mágico especial del aeropuerto de {city} es: {number}.",
        ),
    ),
    "italian": Wording(
        needle="Il numero magico speciale di {city} è: {number}.",
        questions=("Qual è il numero magico speciale di {city}?",),
        questions_for_all=("Quali sono tutti i numeri magici speciali di {city}?",),
        prefix_for_all="I numeri magici speciali di {city} sono:",
        near_misses=(
            "Il codice magico speciale di {city} è: {number}.",
            "Il numero segreto speciale di {city} è: {number}.",
            "Il numero magico comune di {city} è: {number}.",
            "Il numero magico speciale di {city} non è: {number}.",
            "Il numero magico speciale dell'aeroporto di {city} è: {number}.",
        ),
    ),
    "portuguese": Wording(
        needle="O número mágico especial de {city} é: {number}.",
        questions=("Qual é o número mágico especial de {city}?",),
        questions_for_all=("Quais são todos os números mágicos especiais de {city}?",),
        prefix_for_all="Os números mágicos especiais de {city} são:",
        near_misses=(
            "O código mágico especial de {city} é: {number}.",
            "O número secreto especial de {city} é: {number}.",
            "O número mágico comum de {city} é: {number}.",
            "O número mágico especial de {city} não é: {number}.",
            "O número mágico especial do aeroporto de {city} é: {number}.",
        ),
    ),
    "russian": Wording(
        # "города": cities would be declined without it.
        needle="Особое магическое число города {city}: {number}.",
        questions=("Каково особое магическое число города {city}?",),
        questions_for_all=("Каковы все особые магические числа города {city}?",),
        prefix_for_all="Особые магические числа города {city}:",
        near_misses=(
            "Особый магический код города {city}: {number}.",
            "Особое секретное число города {city}: {number}.",
            "Обычное магическое число города {city}: {number}.",
            "Особое магическое число города {city} не равно: {number}.",
            "Особое магическое число аэропорта города {city}: {number}.",
        ),
    ),
    "chinese": Wording(
        needle="{city} 的特殊神奇数字是：{number}。",
        questions=("{city} 的特殊神奇数字是多少？",),
        questions_for_all=("{city} 的所有特殊神奇数字是哪些？",),
        prefix_for_all="{city} 的特殊神奇数字有：",
        near_misses=(
            "{city} 的特殊神奇密码是：{number}。",
            "{city} 的特殊秘密数字是：{number}。",
            "{city} 的普通神奇数字是：{number}。",
            "{city} 的特殊神奇数字不是：{number}。",
            "{city} 机场的特殊神奇数字是：{number}。",
        ),
    ),
}


def wording_named(name: str) -> Wording:
    """A row of the table.

    Raises:
        UsageError: there is none of this name.
    """
    if name not in WORDINGS:
        raise UsageError(f"--wording: no {name!r}{did_you_mean(name, WORDINGS)}")
    return WORDINGS[name]
