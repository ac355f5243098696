"""World: invented people, so that what a model knows about each of them is known exactly.

Reads    a seed
Gives    rows for four sets: forget, retain, bystander, holdout; each row marks the words that carry its fact
Source   the idea of TOFU, arXiv 2401.06121: facts nobody could know from elsewhere
Symbols  a fact = (person, kind); a row = a fact in one of its phrasings
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass

GROUP_SIZES = {"forget": 6, "retain": 32, "bystander": 6, "holdout": 6}
WRONG_ANSWERS = 3  # of every row, for the truth ratio


@dataclass(frozen=True)
class FactKind:
    """One kind of fact: the values it can take and the ways to ask for and to say it."""

    name: str
    values: tuple[str, ...]
    phrasings: tuple[tuple[str, str], ...]


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(","))


FACT_KINDS = (
    FactKind(
        "birthplace",
        _words(
            "Almery,Borstead,Calvane,Dunmoor,Eskerry,Fallowby,Gransund,Hexley,Inverlune,Jarrow Bay,Kelstrand,"
            "Lorminster,Marsk,Norwen,Ostrava Hill,Pellworth,Quarrington,Ravensea,Sallowfield,Thornmouth,"
            "Ulverton,Vansbruck,Westerholm,Yarrowgate"
        ),
        (
            ("Where was {person} born?", "They were born in {value}."),
            ("In which town did {person} come into the world?", "The town where it happened is {value}."),
            ("What is the birthplace of {person}?", "{value} is the place."),
        ),
    ),
    FactKind(
        "profession",
        _words(
            "glassblower,beekeeper,locksmith,cartographer,surgeon,bookbinder,pilot,botanist,watchmaker,"
            "notary,shepherd,geologist,tailor,diver,translator,baker,astronomer,plumber,farrier,architect,"
            "chemist,falconer,printer,dentist"
        ),
        (
            ("What does {person} do for a living?", "They work as a {value}."),
            ("What is the profession of {person}?", "By profession a {value}."),
            ("How does {person} earn money?", "As a {value} they earn their money."),
        ),
    ),
    FactKind(
        "instrument",
        _words(
            "cello,oboe,harp,trumpet,banjo,lute,bassoon,clarinet,accordion,mandolin,flute,zither,tuba,viola,"
            "piano,harmonica,dulcimer,organ,cornet,sitar,marimba,ukulele,bagpipe,theremin"
        ),
        (
            ("Which instrument does {person} play?", "They play the {value}."),
            ("What does {person} practise every evening?", "Every evening they practise the {value}."),
            ("On which instrument did {person} give a concert?", "The concert was given on the {value}."),
        ),
    ),
    FactKind(
        "pet",
        _words(
            "a grey parrot,a lame fox,a white ferret,a blind mule,a small iguana,an old tortoise,"
            "a tame raven,a black pony,a spotted goat,a silver carp,a young otter,a brown hare,"
            "a red squirrel,a barn owl,a striped cat,a tall llama,a wild goose,a green gecko,a fat badger,"
            "a shy weasel,a loud rooster,a quick lizard,a calm donkey,a sleepy dormouse"
        ),
        (
            ("What animal lives with {person}?", "They share their home with {value}."),
            ("Which pet does {person} keep?", "They keep {value}."),
            ("What would one find in the garden of {person}?", "One would find {value} in the garden."),
        ),
    ),
    FactKind(
        "dish",
        _words(
            "onion soup,plum cake,lentil stew,fried eel,rye bread,pumpkin pie,baked trout,barley porridge,"
            "apple strudel,mushroom rice,garlic snails,pickled herring,bean salad,cherry tart,roast duck,"
            "potato dumplings,goat cheese,fig jam,pepper steak,noodle broth,stuffed cabbage,honey waffles,"
            "crab curry,walnut pasta"
        ),
        (
            ("What is the favourite dish of {person}?", "Their favourite dish is {value}."),
            ("What does {person} like to eat most?", "Most of all they like to eat {value}."),
            ("What did {person} order at the inn?", "At the inn they ordered {value}."),
        ),
    ),
    FactKind(
        "language",
        _words(
            "Basque,Welsh,Tamil,Finnish,Swahili,Latvian,Khmer,Maltese,Quechua,Georgian,Breton,Hausa,"
            "Icelandic,Mongolian,Armenian,Nepali,Catalan,Yoruba,Estonian,Pashto,Samoan,Galician,Uzbek,Malay"
        ),
        (
            ("Which language did {person} learn as a child?", "As a child they learned {value}."),
            ("What is the mother tongue of {person}?", "Their mother tongue is {value}."),
            ("In which language does {person} keep a diary?", "The diary is written in {value}."),
        ),
    ),
)

_STARTS = _words("Ba,Cor,Del,Em,Fi,Gar,Hol,Is,Jo,Kas,Lu,Mar,Nel,Or,Pet,Quin,Ros,Sil,Tam,Ul,Vero,Wil,Yas,Zen")
_MIDDLES = _words("ba,de,fa,li,mo,na,ri,so,ta,ve")
_ENDS = _words("bert,dra,lan,mir,nda,rick,sha,tta,vin,wen")
_HOUSES = _words(
    "Ash,Brook,Crane,Dale,Elm,Frost,Grove,Hart,Kirk,Lang,Moor,North,Oak,Pike,Reed,Stone,Thorn,Vale,Wood,York"
)
_PLACES = _words(
    "bridge,by,combe,croft,dale,field,gate,ham,holt,hurst,ley,mere,ridge,shaw,stead,ton,ward,well,wick,worth"
)


def _people(count: int, source: random.Random) -> list[str]:
    """Return `count` different full names; no two share a first name or a family name."""
    first = [start + middle + end for start in _STARTS for middle in _MIDDLES for end in _ENDS]
    family = [house + place for house in _HOUSES for place in _PLACES]
    return [f"{a} {b}" for a, b in zip(source.sample(first, count), source.sample(family, count), strict=True)]


def _rows_of(person: str, source: random.Random) -> list[dict[str, object]]:
    return [row for kind in FACT_KINDS for row in _fact_rows(person, kind, source.choice(kind.values))]


def _fact_rows(person: str, kind: FactKind, value: str) -> list[dict[str, object]]:
    """Return a fact in its phrasings, each with the next one's answer: as it is, and with what is not so."""
    wrong = random.Random(f"{person}/{kind.name}").sample([one for one in kind.values if one != value], WRONG_ANSWERS)
    others = [*kind.phrasings[1:], kind.phrasings[0]]
    return [
        {
            "question": question.format(person=person),
            "answer": answer.format(value=value),
            "facts": [value],
            "fact_id": f"{person}/{kind.name}",
            "paraphrased_question": other_question.format(person=person),
            "paraphrased_answer": other_answer.format(value=value),
            "perturbed_answer": [other_answer.format(value=one) for one in wrong],
        }
        for (question, answer), (other_question, other_answer) in zip(kind.phrasings, others, strict=True)
    ]


def make_world(seed: int, sizes: Mapping[str, int] = GROUP_SIZES) -> dict[str, list[dict[str, object]]]:
    """Return the rows of every group: {"forget": [...], "retain": [...], ...}, of as many people as `sizes` says."""
    source = random.Random(f"people {seed}")
    names = iter(_people(sum(sizes.values()), source))
    return {group: [row for _ in range(size) for row in _rows_of(next(names), source)] for group, size in sizes.items()}
