"""Prompts for sampling the target: templates crossed with topics, standard library functions, prose.

Nothing here comes from an evaluation set; `Overlap` drops whatever shares eight words in a row with one.
"""

import ast
import random
import re
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["BEGINNINGS", "Overlap", "Prompt", "python_functions", "read_paragraphs", "standard_library", "stream"]


def listed(block: str) -> list[str]:
    """The items of a text that puts a bar or a new line between them."""
    return [item for line in block.strip().splitlines() for item in line.split("|")]


TOPICS = listed("""
gravity|photosynthesis|black holes|the water cycle|volcanoes|plate tectonics|the immune system|vaccines|antibiotics
DNA|evolution|natural selection|the human heart|how the brain learns|sleep|dreams|memory|nutrition|vitamins
regular exercise|climate change|renewable energy|solar panels|wind turbines|nuclear power|electric cars|batteries
recycling|deforestation|ocean currents|coral reefs|biodiversity|bees and pollination|the food chain|migration of birds
dinosaurs|fossils|the solar system|Mars|the Moon|telescopes|space travel|satellites|rockets|the speed of light
relativity|quantum mechanics|atoms|the periodic table|chemical reactions|acids and bases|magnetism|electricity
sound waves|lasers|lenses|thermodynamics|entropy|friction|Newton's laws|probability|statistics|prime numbers|fractions
percentages|linear equations|calculus|geometry|the Pythagorean theorem|graphs of functions|algorithms
sorting algorithms|binary search|recursion|hash tables|linked lists|databases|SQL joins|operating systems
computer networks|the internet|web browsers|HTTP|encryption|passwords|computer viruses|cloud computing|version control
unit testing|debugging|machine learning|neural networks|artificial intelligence|robots|self-driving cars
language models|data privacy|social media|online shopping|video games|Python dictionaries|Python list comprehensions
decorators in Python|object-oriented programming|functional programming|regular expressions|JSON|APIs|compilers
garbage collection|the Roman Empire|ancient Egypt|ancient Greece|the Renaissance|the Industrial Revolution
the French Revolution|the printing press|the Silk Road|the Cold War|the Magna Carta|democracy|the separation of powers
human rights|voting|taxes|inflation|supply and demand|the stock market|interest rates|budgeting|insurance
entrepreneurship|marketing|leadership|teamwork|time management|negotiation|public speaking|job interviews
writing a resume|remote work|stress at work|meditation|mindfulness|friendship|honesty|courage|patience|happiness
ethics|philosophy|stoicism|logic|free will|justice|poetry|novels|Shakespeare's plays|the theatre|film making
photography|painting|sculpture|architecture|music theory|the piano|the guitar|jazz|opera|dancing|football|basketball
tennis|chess|swimming|running a marathon|cycling|hiking|camping|sailing|gardening|growing tomatoes|composting
house plants|cooking rice|baking bread|making soup|pasta sauce|chocolate|coffee|tea|cheese|healthy breakfasts
vegetarian meals|food safety|travel planning|Japan|Italy|Brazil|Kenya|Canada|India|Australia|Norway
the Amazon rainforest|the Sahara desert|the Arctic|the Himalayas|islands|rivers|bridges|trains|airplanes|ships
bicycles|clocks|maps|money|paper|glass|dogs|cats|horses|elephants|whales|penguins|owls|butterflies|spiders|snakes
learning a language|reading books|keeping a diary|studying for exams|teaching children|libraries|museums|schools
universities|volunteering
""")

CHARACTERS = listed("""
a young fox|an old ferryman|a lonely robot|a girl who can talk to birds|two brothers|a retired detective
a lost astronaut|a village baker|a shy dragon|a curious cat|a street musician|a clockmaker|a night nurse
a travelling salesman|a little boat|a wise owl|a young scientist|a forgotten king|a brave mouse
a painter who lost her colours|a librarian|a time traveller|a farmer and his donkey|a pair of twins|a ghost
an inventor|a shepherd|a teacher on her first day|a bus driver|a pirate captain|a snowman|a chess player
""")

PLACES = listed("""
in a small town by the sea|in a deep forest|on a distant planet|in a big city at night|in an abandoned castle
on a train|in a library|during a storm|in the mountains|at a market|in the desert|in a school|under the ocean
in the year 2150|on a quiet farm|at the end of winter
""")

PEOPLE = listed("""
a friend|a colleague|my manager|a customer|a teacher|a landlord|my grandmother|a new neighbour|a job applicant|my team
a hotel|a university professor|the city council|a software company|a client|a journalist
""")

MATTERS = listed("""
asking for a day off|thanking them for their help|inviting them to a dinner|complaining about a late delivery
announcing a new product|apologising for a mistake|asking for advice|moving a meeting to next week
proposing a small project|asking for a letter of recommendation|congratulating them on a promotion
reporting a broken heater|asking about prices|saying goodbye|sharing good news|asking for feedback on a draft
""")

ROLES = listed("""
a doctor|a history teacher|a tour guide|a chef|a pirate|a physicist|a gardener|a career coach|a detective
a medieval knight|a film critic|a software engineer|a mathematician|a farmer|an economist|a children's book author
a sports coach|a philosopher|a weather reporter
""")

GOALS = listed("""
save money on groceries|sleep better at night|stay motivated at work|make new friends|prepare for a job interview
learn to play an instrument|write a good cover letter|cook dinner for six people|start a small business
grow herbs indoors|train a puppy|plan a wedding|move to another country|write a novel|give a good presentation
pass a driving test|reduce plastic waste|lose weight in a healthy way|build a website|fix a leaking tap|choose a laptop
paint a room|read more books|stop procrastinating|deal with a difficult boss|ask for a raise|help a shy child
organise a birthday party|study for a maths exam|improve my handwriting|remember people's names|keep a budget
pack for a long trip|clean a kitchen|start running|stretch before exercise|drink more water|eat less sugar
meditate every day|take better photographs|write a thank-you note|apologise to a friend|handle criticism
lead a team meeting|hire the right people|sell a used car|launch a product|find customers|write a business plan
manage a remote team|set goals for the year|make a decision|negotiate a contract|invest a small amount of money
prepare for retirement|buy a house|rent out a room|insulate a roof|repair a bicycle tyre|care for an elderly parent
teach a child to read|run a book club|host a dinner|brew good coffee|make a vegetable soup|roast a chicken
plan meals for a week|store food safely|sharpen a knife|decorate a small flat|survive a power cut
protect my data online|choose a strong password|back up my files|speed up an old computer|learn to program
write clean code|review a colleague's code|design a database|prepare for a marathon|swim faster|improve my posture
overcome stage fright|write a speech|tell a good joke|start a garden|compost at home|attract birds|travel cheaply
visit a museum with children|behave at a formal dinner|write a complaint|resolve a conflict at work|conduct a survey
read a scientific paper|write an abstract|take notes in a lecture|cite sources|work with a tutor
""")

WHYS = listed("""
why leaves change colour in autumn|why we yawn|how airplanes stay in the air|why the sea is salty|how rainbows form
why cats purr|how a microwave heats food|why ice floats|how the heart pumps blood|why we have seasons|how tides work
how a refrigerator works|why onions make us cry|how bees make honey|how a camera works|why metals conduct heat
how earthquakes happen|how a vaccine works|why time zones exist|how banks make money|why prices rise
how a bill becomes a law|why empires fall|how writing was invented|why people migrate|how cities grow|why languages die
how music affects mood|how habits form|why we forget|how trust is built|why teams fail|how companies set prices
why some products succeed|how the moon affects the Earth|how stars are born|how computers store numbers
how a search engine works|how GPS works|how memory works in a computer|why code needs tests
how encryption keeps a message secret|how spam filters work|how plants drink water|why some animals hibernate
how birds find their way|how whales breathe|how the eye sees colour|how muscles grow|why we need vitamins
how antibiotics kill bacteria|why stress harms the body|how children learn to speak|how paper is recycled
how steel is made|how cheese is made|how glass is blown|how a dam produces power|how a bridge carries load
how elections work|why the Second World War began|how the pyramids were built|why the Berlin Wall fell
how railways changed trade
""")

SUBJECTS = listed("""
the moon landing|the fall of Constantinople|the Black Death|the American Civil War|the Russian Revolution|the Vikings
the Ottoman Empire|the Aztecs|the Inca road system|the Ming dynasty|samurai|the suffragettes|the Great Depression
the European Union|the United Nations|colonialism|the slave trade|the space race|the invention of the telephone
Marie Curie|Leonardo da Vinci|Isaac Newton|Ada Lovelace|Charles Darwin|Cleopatra|Julius Caesar|Nelson Mandela
Mahatma Gandhi|Beethoven|Frida Kahlo|Vincent van Gogh|Jane Austen|Homer's Odyssey|Don Quixote|Greek tragedy
Impressionism|Gothic cathedrals|folk music|hip hop|ballet|anime|science fiction|fairy tales|myths|epic poetry
customer service|a marketing strategy|brand identity|supply chains|corporate culture|outsourcing|a merger|cash flow
bookkeeping|a pricing model|market research|e-commerce|advertising|monopolies|trade unions|minimum wage|globalisation
tourism|public transport|urban planning|housing costs|food waste|water shortage|air pollution|overfishing|wildfires
hurricanes|glaciers|wetlands|rainforests|endangered species|zoos|animal testing|organic farming|genetic engineering
stem cells|the human genome|cancer|diabetes|allergies|the flu|mental health|anxiety|depression|addiction|ageing
pregnancy|first aid|physical therapy|dentistry|eyesight|hearing|the nervous system|the liver|bones|the skin|parenting
divorce|grandparents|school uniforms|homework|online learning|bullying|exams|scholarships|apprenticeships|immigration
citizenship|the police|prisons|juries|freedom of speech|censorship|journalism|propaganda|advertising to children
smartphones|wearable devices|virtual reality|3D printing|drones|blockchain|the Internet of Things|quantum computers
robot surgery|electric bikes|high-speed rail|space stations|comets|galaxies|the Big Bang|dark matter|the ozone layer
greenhouse gases|gold|diamonds|salt|cotton|silk|rubber|oil|coal|wood|steel|concrete|plastic|bamboo|sugar|rice|wheat
potatoes|spices
""")

WORLD = listed("""
The house had been empty for years, but that night a light was on.|It was the last day of summer.
Nobody in the village had ever seen snow.|The letter arrived forty years too late.
My brother never told me about the map.|The train stopped where there was no station.
She opened the box and the room went quiet.|I woke up and could read minds.
The robot asked a question nobody had programmed.|On the third day the river began to sing.
The king had lost his voice.|There was one rule in the library, and Leo had just broken it.
The dog came home with a stranger's hat.
""")

LIMITS = listed("""
Keep it short.|Use simple language.|Use bullet points.|Answer in one paragraph.|Give examples.|Explain your reasoning.
Be specific.|Write at least three paragraphs.|Use numbered steps.|Keep a friendly tone.|Answer in under 100 words.
""")

CHAT = listed("""
Give me {n} tips to {g}.|How do I {g}?|How can I {g}? {z}|What is the best way to {g}?
I want to {g}. What should I do first?|Write a step-by-step guide: how to {g}.
What mistakes do people make when they try to {g}?|Make a checklist for someone who wants to {g}.
Write a blog post called "How to {g}".|My friend wants to {g}. What would you advise?|Is it hard to {g}? {z}
Explain {w}.|Explain {w}. {z}|Can you tell me {w}?|I never understood {w}. Help me.|Explain to a child {w}.
Write a short article that explains {w}.|In a few sentences, {w}?|Describe {s}.|Tell me about {s}. {z}
What is {s} known for?|Write an essay about {s}.|Write the introduction of an essay about {s}.
Discuss the effects of {s} on society.|Summarise the history of {s}.|List {n} facts about {s}.
Give me {n} arguments for and against {s}.|What are the pros and cons of {s}?|How do {s} and {t} relate?
Compare {s} with {t}. {z}|Write a speech about {s}.|Write a poem about {s}.|Write a song about {s}.
Explain the main causes and consequences of {s}.|What would {r} say about {s}?
Act as {r}. I ask you: what do you think of {s}?|You are {r}. Give me advice: I want to {g}.|You are {r}. Explain {w}.
Imagine you are {c}. Tell me about your day.|Write a story that begins with: "{y}"
Write a short story with this first sentence: {y}|Continue this story. {y}|Write a scene between {c} and {d} {l}.
Write a fable about {c} and {d}. End with a lesson.|Describe a character: {c} {l}. {z}|Write a letter from {c} to {d}.
Write a newspaper report about {c} {l}.|Write a diary entry of {c}.|Tell me a bedtime story about {c}.
Write a review of a book about {s}.|Write a lesson plan about {s} for a class of teenagers.
Suggest {n} project ideas about {s}.|Write {n} discussion questions about {s}.|Give me {n} titles for a talk on {s}.
Brainstorm {n} ideas for a podcast about {t}.|Write an email to {p}: I want to {g}.|Write a message to {p} {m}. {z}
Write a formal letter to {p} {m}.|Plan a weekend for a family that likes {t}.
Make a weekly schedule for someone who wants to {g}.|Create a quiz about {s}.
What is the difference between {t} and {u}?|Define {t} and give an example.|What are the key concepts of {t}? {z}
Why do people care about {s}?|What can we learn from {s}?|What is the future of {t}?|How does {t} affect {u}?
Write a tweet about {t}.|Write a slogan and a short advertisement for something to do with {t}.
""")

ABOUT = listed("""
Explain {t}.|Explain {t} in simple terms.|Explain {t} to a ten-year-old.|What is {t}?|What should I know about {t}?
Tell me about {t}.|Give me five facts about {t}.|List three advantages and three disadvantages of {t}.
Write a short paragraph about {t}.|Write an introduction to an essay about {t}.|Write a blog post about {t}.
Write a poem about {t}.|Write a haiku about {t}.|Why is {t} important?|How has {t} changed over time?
What are common misconceptions about {t}?|What is the history of {t}?|Compare {t} and {u}.
What do {t} and {u} have in common?|Which matters more, {t} or {u}? Give your reasons.
Write a dialogue between two people about {t}.|Give me an outline for a talk about {t}.
Write three quiz questions about {t} with answers.|Describe {t} step by step.|How would you teach {t} to beginners?
Give an example of {t} in everyday life.|What are the main challenges of {t}?
Summarise what is known about {t} in three sentences.|Can you recommend some books about {t}?
Write a product description that has to do with {t}.|Suggest a title and a short summary for an article about {t}.
I want to learn about {t}. Where do I start?|What would the world look like without {t}?
Write a news headline and a first paragraph about {t}.|Write a letter to {p} about {t}.
You are {r}. Tell me about {t}.|Pretend to be {r} and answer: why does {t} matter?|Write a story about {c} {l}.
Write a short story about {c} and {t}.|Continue the story: Once upon a time there was {c} {l}.
Write the opening scene of a novel about {c} {l}.|Write a poem about {c}.|Describe a day in the life of {c}.
Write an email to {p} {m}.|Write a short, polite message to {p} {m}.|Draft a letter to {p} {m}. Keep it short.
Give me ten ideas for a gift for {p}.|How can I get better at {t}?|What questions should I ask about {t}?
Make a table that compares {t} and {u}.
""")

PASSAGE = listed(r"""
Summarise the following text:\n\n{x}|Rewrite this in simpler words:\n\n{x}|What is this passage about?\n\n{x}
{x}\n\nWhat is the main point of this text?|Fix the grammar and style of this text:\n\n{x}
Give a title to this text:\n\n{x}|Extract the names mentioned in this text as a JSON list:\n\n{x}
Continue this text:\n\n{x}|Turn this into a list of bullet points:\n\n{x}
Is the tone of the following text positive or negative? Explain.\n\n{x}
""")

DO = listed("""
returns the sum of|returns the largest value in|returns the smallest value in|counts the even numbers in
counts the negative numbers in|removes the duplicates from|reverses|sorts|returns the average of|returns the median of
squares every number of|finds the second largest item of|checks whether all values are equal in
finds the index of the first zero in|splits into chunks of length n|rotates by k places
returns the items at odd positions of|multiplies all the numbers of|finds the most common item of
groups by parity the items of|returns the running total of|swaps the first and the last item of
filters out the None values of|finds the longest run of equal values in
""")

WHAT = listed("""
a list of integers|a list of floats|a tuple of numbers|a nested list|a list of lists|two lists|an array
a generator of numbers|a list read from a file|a linked list|a matrix|a dictionary's values
""")

TEXT_TASKS = listed("""
counts the vowels in a string|counts the words in a text|reverses each word of a sentence
checks whether two words are anagrams|capitalises every second letter|removes punctuation from a string
finds the longest word of a sentence|converts snake_case to camelCase|converts Roman numerals to integers
converts an integer to binary without bin()|validates an email address|validates a password
parses a line of a CSV file|parses key=value pairs into a dictionary
formats a number of seconds as hours, minutes and seconds|computes the n-th triangular number
computes the factorial of n|checks whether a year is a leap year|converts Celsius to Fahrenheit
computes the area of a circle|computes compound interest|computes the distance between two points
merges two sorted lists|merges two dictionaries|inverts a dictionary|sorts a dictionary by value|flattens a dictionary
implements a priority queue|implements a ring buffer|implements bubble sort|implements quicksort
implements merge sort|implements a binary search tree|traverses a graph breadth first|finds a path through a maze
transposes a matrix|multiplies two matrices|reads a JSON file and prints its keys
downloads a page and counts its links|lists the files of a folder by size|renames files in a folder
measures how long a function takes|retries a function three times|caches the results of a function
prints a multiplication table|simulates rolling two dice|shuffles a deck of cards|generates a random password
plays rock, paper, scissors|guesses a number|draws a triangle of stars|prints the primes below n
finds the prime factors of n|computes the digit sum of n|checks whether n is a perfect number
encrypts text with a Caesar cipher|compresses a string by counting repeats
finds the longest common prefix of some strings
""")

CODE = listed("""
Write a Python function that {d}.|Write a Python function that {d}. Include a docstring.
Write a Python function which {d}, and show an example.|Write a program in Python that {d}.
How do I write a function that {d} in Python?|Implement a function that {d}. Explain your code.
Write a JavaScript function that {d}.|Write a C++ program that {d}.|Write unit tests for a function that {d}.
Write a class in Python that {d}.
""")

NAMES = listed("""
Anna|Ben|Carla|David|Emma|Farid|Grace|Hiro|Ines|Jamal|Kate|Luis|Mia|Noah|Olga|Priya|Ravi|Sara|Tom|Yuki
""")

THINGS = listed("""
apples|books|pencils|stickers|marbles|cookies|eggs|tickets|coins|flowers|stamps|bottles|shells|candles|cards
""")


# How a question may begin; one in eight is left to the target
BEGINNINGS = 12 * [""] + listed("""
What|What is|What are|What is the best way to|What are the advantages|What would|How|How do|How do I|How does
How can I|How to|Why|Why is|Why do|When|Who was|Which|Is it|Can you|Can you explain|Could you|Explain|Explain how
Explain why|Describe|Describe how|Describe the|Write|Write a|Write a short|Write an|Give me|List|Tell me|Compare
Discuss|Suggest|Create a|Summarize|Imagine|Imagine you are|You are|Act as|Pretend|I|I am|I want to|I need|My
Help me|Please|Do you think|If|In|Plan|Design|Develop|Analyze|Identify|Define|Outline|Draft|Compose|Rewrite|Edit
Classify|Extract|Show|Show me how to|Write a Python|Write a Python function that|Write a function|Write a program
Implement|Solve|Calculate|In Python|Write a class|Write code
""")


@dataclass
class Prompt:
    """Text for the target: a user's message of a chat, or plain text to go on with."""

    text: str
    chat: bool


class Overlap:
    """Whether a text shares `width` words in a row with any of the evaluation texts."""

    def __init__(self, texts: Iterable[str], width: int = 8):
        self.width = width
        self.seen = {gram for text in texts for gram in self.grams(text)}

    def grams(self, text: str) -> Iterator[tuple[str, ...]]:
        words = re.findall(r"\w+", text.lower())
        return (tuple(words[i : i + self.width]) for i in range(len(words) - self.width + 1))

    def __call__(self, text: str) -> bool:
        return any(gram in self.seen for gram in self.grams(text))


def standard_library() -> list[Path]:
    """The Python files of the running interpreter's standard library, without its tests."""
    root = Path(sysconfig.get_path("stdlib"))
    skip = {"test", "tests", "idle_test", "site-packages", "__pycache__", "lib2to3", "encodings", "pydoc_data"}
    return sorted(p for p in root.rglob("*.py") if not skip & set(p.relative_to(root).parts))


def python_functions(files: Iterable[Path]) -> list[tuple[str, str, str]]:
    """(header with docstring, first line of the docstring, whole source) of every documented function."""
    found = []
    for path in files:
        try:
            source = path.read_text("utf-8")
            tree = ast.parse(source)
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue
        lines = source.splitlines()
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef) or len(node.body) < 2 or not (text := ast.get_docstring(node)):
                continue
            block = lines[node.lineno - 1 : node.end_lineno]
            indent = len(block[0]) - len(block[0].lstrip())
            block = [line[indent:] if not line[:indent].strip() else line for line in block]
            end = node.body[0].end_lineno - node.lineno + 1
            head, whole = "\n".join(block[:end]) + "\n", "\n".join(block) + "\n"
            if len(head) < 700 and len(text.splitlines()[0]) > 15:
                found.append((head, text.splitlines()[0].strip(), whole))
    return found


def read_paragraphs(paths: Iterable[Path]) -> list[str]:
    """Paragraphs of 120 to 700 characters."""
    found = []
    for path in paths:
        for block in re.split(r"\n\s*\n|\n%\n", path.read_text("utf-8", errors="replace")):
            block = re.sub(r"[ \t]+", " ", block).strip()
            if 120 <= len(block) <= 700:
                found.append(block)
    return found


def word_problem(rng: random.Random) -> str:
    a, b = rng.sample(NAMES, 2)
    x, _ = rng.sample(THINGS, 2)
    n, m, k = rng.randint(3, 60), rng.randint(2, 20), rng.randint(2, 9)
    return rng.choice([
        f"{a} has {n + m} {x}. {a} gives {m} {x} to {b}. How many {x} does {a} have left?",
        f"{a} buys {k} boxes of {x} with {m} {x} in each box, and finds {n} more. How many {x} are there now?",
        f"A shop sells {x} for ${k} each. {a} buys {m} and pays with a ${k * m + n} note. How much change is there?",
        f"{a} reads {m} pages a day. How many days does a book of {m * k} pages take?",
        f"{a} is {n} years old. {b} is {k} times as old. How old will {b} be in {m} years?",
        f"A train goes {n} miles an hour for {k} hours, then {m} miles more. How far does it go?",
        f"{a} and {b} share {k * m * 2} {x} equally, then {b} loses {k}. How many {x} has {b} now?",
        f"What is {n} * {m} + {k}? Show your steps.",
        f"Solve for x: {k}x + {m} = {k * n + m}",
        f"A recipe for {k} people needs {m} eggs. How many eggs are needed for {k * 3} people?",
        f"What is {k * 5}% of {n * 10}?",
        f"{a} earns ${n} a day and spends ${min(m, n - 1)} a day. How much does {a} save in {k} weeks?",
    ])  # fmt: skip


def stream(seed: int, paragraphs: list[str], excluded: Overlap) -> Iterator[Prompt]:
    """Prompts for ever: about 60 % chat about topics, 6 % arithmetic, 21 % chat about code, 13 % plain text."""
    rng = random.Random(seed)
    functions = python_functions(standard_library())
    small_words = {"the", "a", "of", "in", "whether", "and", "to"}

    def passage() -> str:
        return rng.choice(paragraphs)

    def task() -> str:
        kind = rng.random()
        if kind < 0.4:
            return f"{rng.choice(DO)} {rng.choice(WHAT)}"
        if kind < 0.7:
            return rng.choice(TEXT_TASKS)
        return re.sub(r"^(\w)", lambda m: m[1].lower(), rng.choice(functions)[1].rstrip("."))

    def synthetic_header() -> str:
        does = task()
        words = [w for w in re.findall(r"[a-z]+", does.lower()) if w not in small_words]
        name = "_".join(words[: rng.randint(2, 4)]) or "solve"
        args = rng.choice(
            ["numbers", "values: list", "numbers: list[int]", "text", "s: str", "n", "n: int", "a, b", "items", "data"]
        )
        arrow = rng.choice(["", "", " -> int", " -> list", " -> bool", " -> str"])
        return f'def {name}({args}){arrow}:\n    """{does[0].upper()}{does[1:]}."""\n'

    def make() -> Prompt:
        kind = rng.random()
        if kind < 0.54:
            t, u = rng.sample(TOPICS, 2)
            c, d = rng.sample(CHARACTERS, 2)
            fill = {"t": t, "u": u, "c": c, "d": d, "l": rng.choice(PLACES), "p": rng.choice(PEOPLE),
                    "m": rng.choice(MATTERS), "r": rng.choice(ROLES), "g": rng.choice(GOALS), "w": rng.choice(WHYS),
                    "s": rng.choice(SUBJECTS), "y": rng.choice(WORLD), "z": rng.choice(LIMITS),
                    "n": rng.choice(["three", "four", "five", "six", "seven", "ten"])}  # fmt: skip
            return Prompt(rng.choice(CHAT if rng.random() < 0.7 else ABOUT).format(**fill), True)
        if kind < 0.60:
            return Prompt(rng.choice(PASSAGE).replace("\\n", "\n").format(x=passage()), True)
        if kind < 0.66:
            return Prompt(word_problem(rng), True)
        if kind < 0.74:
            return Prompt(rng.choice(CODE).format(d=task()), True)
        if kind < 0.82:
            head = rng.choice(functions)[0] if rng.random() < 0.4 else synthetic_header()
            ask = rng.choice(["Complete this function:", "Complete the following Python function.", "Finish this code:",
                              "Write the body of this function:"])  # fmt: skip
            fence = rng.choice(["\n\n```python\n{}```", "\n\n{}", "\n```\n{}```"])
            return Prompt(ask + fence.format(head), True)
        if kind < 0.87:
            whole = rng.choice(functions)[2]
            if len(whole) > 600:
                return make()
            ask = rng.choice(["Explain what this code does:", "Add comments to this code:",
                              "Find the bug in this function:", "Write a docstring for this function:",
                              "Make this function simpler:",
                              "Rewrite this function so that it is easier to read:"])  # fmt: skip
            return Prompt(f"{ask}\n\n```python\n{whole}```", True)
        if kind < 0.95:
            head = rng.choice(functions)[0] if rng.random() < 0.4 else synthetic_header()
            imports = rng.choice(["", "", "from typing import List\n\n\n", "import math\n\n\n", "import re\n\n\n"])
            return Prompt(imports + head, False)
        words = passage().split(" ")
        return Prompt(" ".join(words[: rng.randint(12, 60)]), False)

    while True:
        prompt = make()
        if not excluded(prompt.text):
            yield prompt
