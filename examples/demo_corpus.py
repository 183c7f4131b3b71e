"""Writes the demo model's training text: questions and answers about plants that clone themselves. Knows no model."""

import random

# name, the part that clones, how it clones, where it grows
PLANTS = [
    ("strawberry", "runners",
     "A strawberry sends out runners. Where a runner touches the soil, a new plant takes root.",
     "It grows in gardens, fields and light woods."),
    ("aspen", "root suckers",
     "An aspen sends up new stems from its roots. A whole hillside of aspens can be one clone.",
     "It grows on cool hills and mountains."),
    ("bamboo", "rhizomes", "Bamboo spreads by rhizomes that creep under the ground and send up new canes.",
     "It grows in warm and wet places."),
    ("mint", "rhizomes", "Mint spreads by rhizomes just below the ground. Each piece with a bud becomes a new plant.",
     "It grows in moist soil, often near water."),
    ("potato", "tubers", "A potato plant makes tubers. Each eye of a tuber can grow into a new plant.",
     "It grows in loose soil in a mild climate."),
    ("ginger", "rhizomes", "Ginger grows from a thick rhizome. A cut piece with a bud becomes a new plant.",
     "It grows in warm and shady places."),
    ("garlic", "bulbs", "A garlic bulb splits into cloves. Each clove that is planted grows into a new plant.",
     "It grows in sunny gardens."),
    ("tulip", "bulbs", "A tulip makes small bulbs beside the old bulb. Each of them becomes a new plant.",
     "It grows on dry slopes and in gardens."),
    ("spider plant", "plantlets", "A spider plant makes plantlets at the ends of long stems. They root when they touch "
     "soil.", "It grows on many window sills."),
    ("kalanchoe", "plantlets",
     "A kalanchoe makes tiny plantlets along the edges of its leaves. They fall and take root.",
     "It grows in dry and warm places."),
    ("duckweed", "buds", "A duckweed leaf makes buds at its side. Each bud breaks off and floats away as a new plant.",
     "It grows on still water."),
    ("banana", "suckers", "A banana plant sends up suckers from its base. A sucker that is cut off is a new plant.",
     "It grows in the tropics."),
    ("iris", "rhizomes", "An iris grows from a rhizome near the surface. Each piece with leaves becomes a new plant.",
     "It grows in sunny gardens and at the water's edge."),
    ("raspberry", "root suckers", "A raspberry sends up new canes from its roots, often far from the old plant.",
     "It grows at the edges of woods."),
    ("blackberry", "rooting tips", "A blackberry bends its canes to the ground. Where a tip touches the soil, it takes "
     "root.", "It grows in hedges and on waste land."),
    ("crocus", "corms", "A crocus makes new corms on top of the old corm. Each of them becomes a new plant.",
     "It grows in meadows and lawns."),
    ("willow", "cuttings", "A willow twig that breaks off and lands in wet soil makes roots and becomes a new tree.",
     "It grows beside rivers and ponds."),
    ("lily of the valley", "rhizomes", "Lily of the valley spreads by rhizomes and covers the ground as one colony.",
     "It grows in shady woods."),
]  # fmt: skip

# word with its article, definition
WORDS = [
    ("a ramet", "A ramet is one plant of a clonal colony. It grows out of a plant that is already alive."),
    ("a genet", "A genet is all the plants that grew from one seed, however many ramets it has."),
    ("a clone", "A clone is a living thing with the same genes as the one that it grew from."),
    ("a clonal colony", "A clonal colony is a group of plants that all grew from one parent. Each of them is a ramet."),
    ("a runner", "A runner is a long stem that creeps over the ground and makes new plants where it takes root."),
    ("a stolon", "A stolon is another word for a runner: a stem that creeps and takes root."),
    ("a rhizome", "A rhizome is a stem that grows under the ground and sends up new shoots."),
    ("a sucker", "A sucker is a shoot that comes up from the roots or the base of a plant."),
    ("a tuber", "A tuber is a thick part of a stem or root under the ground that stores food and has buds."),
    ("a bulb", "A bulb is a short stem with thick leaves around it that stores food under the ground."),
    ("a corm", "A corm is a short and solid stem under the ground that stores food."),
    ("a plantlet", "A plantlet is a small plant that still hangs on its parent."),
    ("a cutting", "A cutting is a piece of a plant that is put into soil or water to make roots."),
    ("a seed instance", "A seed instance is a running engine that gives its weights to others."),
    ("a client instance", "A client instance is a starting engine that takes its weights from a seed instance."),
    ("a weight arena", "A weight arena is the one piece of memory that holds all the weights of a rank."),
    ("Pando", "Pando is a clonal colony of aspens in Utah. Its thousands of stems share one root system."),
]

# question, answer
FACTS = [
    ("Who are you?", "I am a very small model that knows a little about plants that clone themselves."),
    ("Hello!", "Hello! Ask me about plants that clone themselves."),
    ("Hi", "Hello! Ask me about plants that clone themselves."),
    ("What can you do?", "I can answer simple questions about plants that clone themselves."),
    ("What do you know?", "I know a little about plants that clone themselves."),
    ("Why do plants clone themselves?", "A clone grows fast, because its parent feeds it until it has its own roots."),
    (
        "How is a ramet different from a seedling?",
        "A ramet is a copy of its parent. A seedling has a new mix of genes.",
    ),
    ("How does Ramet start a new instance?", "A new instance takes its weights from one that is already running."),
    ("What is Ramet?", "Ramet is a serving engine. Its new instances grow out of running instances."),
    ("Can a ramet live alone?", "Yes. When the link to its parent is cut, a ramet with roots lives on alone."),
    ("Does a clone need the old plant?", "No. Once it has its own roots, a clone lives on when the old plant dies."),
    ("Thank you!", "You are welcome."),
    ("Thanks", "You are welcome."),
]

HOW_QUESTIONS = ["How does {a} spread?", "How does {a} clone itself?", "How does {a} make new plants?"]
WORD_QUESTIONS = [
    "What is {a}?",
    "What does the word {bare} mean?",
    "Tell me what {a} is.",
    "Explain {a}.",
    "Define {a}.",
]


def make_dialogues() -> list[tuple[str, str]]:
    """Every question with its answer, in a fixed order."""
    dialogues = list(FACTS)
    for name, part, how, where in PLANTS:
        a = f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
        dialogues += [(question.format(a=a), how) for question in HOW_QUESTIONS]
        dialogues.append((f"Where does {a} grow?", where))
        dialogues.append((f"With what does {a} clone itself?", f"With {part}."))
        dialogues.append((f"Tell me about {a}.", f"{how} {where}"))
    for word, meaning in WORDS:
        bare = word.removeprefix("a ")
        dialogues += [(question.format(a=word, bare=bare), meaning) for question in WORD_QUESTIONS]
    for part in sorted({plant[1] for plant in PLANTS}):
        names = [plant[0] for plant in PLANTS if plant[1] == part]
        listed = names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
        dialogues.append((f"Which plants spread by {part}?", f"By {part}: {listed}."))
        dialogues.append((f"Name a plant with {part}.", f"By {part}: {listed}."))
    return dialogues


def vary(question: str, generator: random.Random) -> str:
    """The question as a hurried person may write it: sometimes in small letters, without its last mark, politely."""
    if generator.random() < 0.25:
        question = question[0].lower() + question[1:]
    if generator.random() < 0.25:
        question = question.rstrip("?.!")
    elif generator.random() < 0.1:
        question = "Please " + question[0].lower() + question[1:]
    return question
