"""The texts of :mod:`eagle.train.openings`: alternatives separated by ``|`` or line ends, ``{slot}`` to be filled.

A template that ends in ``...`` is continued by the model. All of it was written for this project.
"""

SLOTS: dict[str, str] = {
    "subject": """\
a lighthouse keeper who finds an old map|two sisters who open a bakery|a robot that learns to paint|a lost dog
the first day at a new school|a village at the edge of a desert|an astronaut who misses home
a musician who loses her hearing|a train ride through the mountains|a forgotten library|a storm at sea
a grandfather and his garden|a detective in a small town|a boy who can talk to birds|the last bookshop in the city
a dragon who is afraid of fire|a friendship between rivals|autumn leaves|the sound of rain|a city that never sleeps
a marathon runner|a haunted house|a secret door|the ocean at night|a chef who cannot taste
a time traveller stuck in 1920|a letter that arrives too late|a winter without snow|an old piano|a young inventor
a football match|the moon|hope|courage|loneliness|childhood memories|a long journey|forgiveness""",
    "form": """\
short story|poem|haiku|short essay|fairy tale|song|dialogue|monologue|limerick|fable|diary entry|scene for a play
letter|speech|news article|blog post|review|opening paragraph for a novel|children's story""",
    "document": """\
cover letter|thank-you note|complaint letter|meeting invitation|newsletter|press release|job advertisement
product description|landing page text|apology email|letter of recommendation|resignation letter|social media post
FAQ page|project proposal|business plan summary|fundraising email|travel guide|reminder email
welcome message for new employees""",
    "purpose": """\
a small coffee shop|a charity for homeless animals|a software company|a local library|a new fitness app
a primary school|an online bookstore|a hotel by the sea|a bicycle repair shop|a science museum|a dental practice
a music festival|an organic farm|a car rental company|a language school|a theatre group|a wedding planner
a housing cooperative|a start-up""",
    "tone": """\
friendly|formal|funny|serious|warm|persuasive|polite|cheerful|dramatic|concise|poetic|professional|enthusiastic""",
    "place": """\
Japan|Brazil|Portugal|Iceland|Egypt|Kenya|Norway|Vietnam|Peru|Canada|Greece|Morocco|Rome|Istanbul|Vienna|New York
Cape Town|Sydney|Prague|Buenos Aires|Edinburgh|Seoul|Mexico City|the Alps|the Scottish Highlands""",
    "role": """\
a history teacher|a pirate captain|a career coach|a nutritionist|a tour guide|a medieval knight|a kind doctor
a personal trainer|a stand-up comedian|a librarian|a chess grandmaster|a gardener|a detective|a financial adviser
a poet|a philosopher|a chef|a job interviewer|a travel agent|a wise old wizard|a spaceship's computer|a talking cat
a news anchor|a physics professor|a psychologist|a software architect|a sports commentator|a lawyer|a marketing expert
Sherlock Holmes|Albert Einstein|Shakespeare|Cleopatra|Leonardo da Vinci|a Roman emperor|an alien visiting Earth
a ghost|a football coach""",
    "roletask": """\
introduce yourself|give me advice for a stressful week|tell me about your typical day|explain what you love most
answer my questions|help me plan my weekend|tell me a story from your past|describe your home|give me three tips
motivate me|explain what the internet is|convince me to learn something new|review a restaurant
comment on modern technology|teach me a lesson""",
    "concept": """\
photosynthesis|gravity|black holes|the water cycle|plate tectonics|DNA|evolution|natural selection|electricity
magnetism|the greenhouse effect|vaccines|antibiotics|the immune system|the human heart|the nervous system
nuclear fusion|nuclear fission|radioactivity|quantum entanglement|the theory of relativity|Newton's laws of motion
thermodynamics|entropy|acids and bases|chemical bonds|the periodic table|catalysts|sound waves|lasers|semiconductors
superconductivity|batteries|solar panels|tides|earthquakes|volcanoes|the ozone layer|cell division|stem cells
genetic engineering|the carbon cycle|the Big Bang|dark matter|stars|comets|the speed of light|friction|osmosis|enzymes
hormones|viruses|bacteria|climate change""",
    "tech": """\
a neural network|a database index|a hash table|the internet|public-key encryption|a blockchain|a compiler
an operating system|cloud computing|machine learning|version control|an API|recursion|object-oriented programming
a firewall|binary search|a linked list|a web browser|a CPU|RAM|a search engine|big O notation|unit testing
a virtual machine|a cache|reinforcement learning|natural language processing|a recommendation system|a microservice
concurrency|garbage collection""",
    "humtopic": """\
the French Revolution|the Roman Empire|the Industrial Revolution|the Renaissance|World War I|World War II|the Cold War
the Silk Road|ancient Egypt|ancient Greece|the Ottoman Empire|the Mongol Empire|the Great Depression|colonialism
the Enlightenment|democracy|capitalism|socialism|globalisation|inflation|supply and demand|human rights
the separation of powers|stoicism|existentialism|utilitarianism|free will|the social contract|Buddhism|Islam
Christianity|Hinduism|Impressionism|jazz|Baroque music|Gothic architecture|the printing press|women's suffrage
the civil rights movement|the fall of the Berlin Wall|the Magna Carta|the Black Death|the space race|feminism
nationalism|the United Nations|the European Union|Romanticism""",
    "everyday": """\
learn a new language|sleep better|save money|start a garden|make friends in a new city|prepare for a job interview
stop procrastinating|cook rice|train for a marathon|clean a kitchen|organise a birthday party|choose a laptop
read more books|reduce stress|meditate|write a CV|take better photographs|learn the guitar|raise a puppy
pack for a long trip|eat healthily|build a bookshelf|give a presentation|improve my memory|negotiate a salary
bake bread|change a tyre|learn to swim|stay motivated|plan a budget|manage my time|work from home|study for an exam
write a book|speak in public|grow tomatoes|remove a coffee stain""",
    "thing": """\
cats|dogs|electric cars|bicycles|coffee|tea|books|films|social media|video games|city life|country life|remote work
public transport|nuclear energy|wind power|solar energy|artificial intelligence|smartphones|vegetarian food|fast food
zoos|online learning|homework|school uniforms|space exploration|tourism|advertising|paper books|e-books|running
swimming|yoga""",
    "language": """\
Python|JavaScript|Java|C++|C|Go|Rust|TypeScript|SQL|Ruby|Bash|PHP""",
    "codetask": """\
reverses a string|checks whether a number is prime|computes the factorial of a number|sorts a list of numbers
finds the largest element in an array|counts the vowels in a string|checks whether a string is a palindrome
returns the first n Fibonacci numbers|merges two sorted lists|removes duplicates from a list
reads a CSV file and sums a column|converts Celsius to Fahrenheit|finds the greatest common divisor of two numbers
implements binary search|implements a stack|implements a queue with two stacks|counts the words in a text file
finds the most frequent word in a text|flattens a nested list|transposes a matrix|multiplies two matrices
validates an email address|generates a random password|implements quicksort|finds all permutations of a list
checks for balanced brackets|computes the average of a list|prints a multiplication table
finds the second largest number in a list|rotates a list by k places|finds the missing number between 1 and n
groups words that are anagrams|implements depth-first search on a graph|finds the shortest path in a grid
inverts a binary tree|computes the height of a binary tree|removes the nth node of a linked list|parses a JSON string
downloads a web page|counts islands in a grid|implements a simple calculator|simulates rolling two dice
converts a Roman numeral to an integer""",
    "name": """\
Anna|Ben|Carla|David|Elena|Farid|Grace|Hiro|Ines|Jonas|Kavya|Liam|Maria|Nadia|Omar|Paula|Quentin|Rosa|Sam|Tara|Umar
Vera|Wei|Yusuf|Zoe|Thomas|Lucy|Peter|Sofia|Daniel""",
    "surname": """\
Keller|Moreau|Okafor|Tanaka|Silva|Novak|Brandt|Costa|Haddad|Lindqvist|Marsh|Rossi|Patel|Doyle|Fischer|Nguyen""",
    "company": """\
Northwind Foods|Blue Harbor Logistics|Helix Software|Greenleaf Energy|Orion Textiles|Summit Bank|Brightside Toys
Atlas Robotics|Riverside Clinic|Pine Valley Farms|Lumen Optics|Harvest Bakery""",
    "job": """\
engineer|accountant|nurse|designer|sales manager|data analyst|teacher|architect|chemist|project manager|cook|lawyer""",
    "city": """\
Lisbon|Chicago|Osaka|Nairobi|Berlin|Toronto|Lyon|Dublin|Madrid|Austin|Oslo|Mumbai|Warsaw|Leeds|Denver|Lima""",
    "month": """\
January|February|March|April|May|June|July|August|September|October|November|December""",
    "item": """\
apples|pencils|books|chairs|tickets|cookies|bottles|shirts|stamps|marbles|oranges|lamps|notebooks|cups|balls""",
    "passage": """\
{name} {surname} joined {company} in {city} as a {job} in {month} {year}. Two years later {name2} {surname2} took over the team.
The invoice from {company}, dated {d} {month} {year}, lists {n} {item} at ${m} each and {k} {item2} at ${n} each, payable in {k} days.
On {d} {month}, {company} opened a new office in {city}. The manager, {name} {surname}, plans to hire {n} people this year.
{name} bought {n} {item} in {city} on {month} {d} for ${m}. The shop, {company}, promised delivery within {k} days but was late.
The meeting in {city} was attended by {name} {surname} ({job}), {name2} {surname2} ({job2}) and guests from {company}. It lasted {k} hours.
I stayed at the hotel in {city} for {k} nights. The room was clean and quiet, but the breakfast was cold and the staff seemed tired.
The phone has a bright screen and a battery that lasts {k} days. The camera is weak in the dark, and at ${mm} it is too expensive.
Bees visit flowers to collect nectar and pollen. As they move from plant to plant they carry pollen with them, which lets plants make seeds.
The river floods every spring, when the snow melts in the hills. Farmers wait for the water to fall, then sow wheat in the fresh mud.
{company} reported sales of {n} million dollars in {year}, up from {m} million a year before. Costs rose by {k} percent in the same time.
Glass is made by melting sand with soda and lime at high heat. When it cools quickly, it becomes solid without forming crystals.
The film follows {name}, a young {job} from {city}, who inherits a house and discovers that someone has lived in it for years.""",  # noqa: E501
    "wordproblem": """\
{name} has {n} {item} and buys {m} more. {name} then gives away {k}. How many {item} are left?
A train travels {nn} kilometres in {k} hours. What is its average speed?
A shirt costs ${mm} and is reduced by {p} percent. What is the new price?
{name} reads {m} pages a day. How long does it take to read a book of {nn} pages?
A rectangle is {n} cm long and {m} cm wide. What are its area and perimeter?
The sum of two numbers is {n} and their difference is {k}. What are the two numbers?
A box holds {n} {item}. How many boxes are needed for {nn} {item}?
{name} is {k} years older than {name2}. Together they are {n} years old. How old is each of them?
If {k} workers build a wall in {m} days, how long do {k2} workers need?
A bag has {k} red, {k2} blue and {m} green balls. What is the probability of drawing a red ball?
A car uses {k} litres of fuel for 100 km. How much does it need for {nn} km?|What is {p} percent of {nn}?
{name} earns ${m} an hour and works {n} hours a week. How much does {name} earn in {k} weeks?
The average of five numbers is {m}. Four of them are {k}, {k2}, {n} and {m}. What is the fifth?
A circle has a radius of {k} cm. What is its area?
You invest ${nn} at {k} percent interest a year. How much do you have after {k2} years?""",
    "equation": """\
{k}x + {m} = {n}|{k}x - {m} = {n}|x/{k} + {m} = {n}|x^2 - {k2}x + {k} = 0|{k}(x - {k2}) = {n}|{m} - {k}x = {k2}
x^2 = {nn}|{k}x + {k2}y = {n} and x - y = {k}|2^x = {nn}|f(x) = {k}x^2 + {m}x - {n}, find f({k2})""",
    "puzzle": """\
{name} is taller than {name2}, and {name2} is taller than {name3}. Who is the shortest?
If all roses are flowers and some flowers fade quickly, can we say that some roses fade quickly? Explain.
A farmer has {n} sheep and all but {k} run away. How many are left?
{name} faces north, turns right twice and then left. Which direction is {name} facing now?
Which word does not belong: {item}, {item2}, {city}, {item3}? Explain why.
Three friends, {name}, {name2} and {name3}, each own a cat, a dog or a bird. {name} is allergic to fur. {name2} has no cat. Who owns what?
What comes next in the sequence {k}, {a2}, {a3}, {a4}? Explain your reasoning.
If it takes {k} machines {k} minutes to make {k} toys, how long do {n} machines need for {n} toys?
Yesterday was two days after Monday. What day is it tomorrow?
A clock shows {k} o'clock. What will it show {n} hours later?
Is it possible for {name} to be the uncle of {name2} and younger than {name2}? Explain.
A man looks at a photo and says: "Her mother is my mother's only daughter." Who is in the photo?""",  # noqa: E501
    "length": """\
short|brief|detailed|simple|long|vivid|one-paragraph|two-paragraph""",
    "audience": """\
a five-year-old|a beginner|a high school student|a busy manager|my grandmother|an expert|a class of teenagers""",
    "sentence": """\
The meeting has been moved to {month} {d}.|She don't like going to the market on sundays.
Me and {name} was walking to the park when it start raining.|The weather is lovely today, and we are going for a walk.
I am writing to ask whether my order of {n} {item} has been shipped.|He said that he will came tomorrow but he didn't.
Please send me the report as soon as possible.|The food was good but the service was not so good and we waited long.
Due to the fact that it was raining, we made the decision to stay at home.
There is many reasons why people likes {thing}.""",
    "text2": """\
French|Spanish|German|Italian|simple English|formal English|a tweet|a headline|the past tense|bullet points""",
}
"""What a slot may hold; slots may hold slots."""

TEMPLATES: dict[str, str] = {
    "writing": """\
Write a {length} {form} about {subject}.|Write a {form} about {subject}.|Write a {tone} {form} about {subject}.
Can you write a {form} about {subject}?|Compose a {tone} {form} for {purpose}.|Write a {document} for {purpose}.
Draft a {tone} {document} for {purpose}. Keep it under {hundreds} words.
I need a {tone} {document} for {purpose}. Can you help?|Write a {document} that mentions {purpose} and {thing}.
Write a {tone} email to {name} about {thing}.|Describe {subject} in a {tone} way.
Write the first paragraph of a {form} about {subject} and end with a surprise.
Give me five titles for a {form} about {subject}.|Rewrite this sentence in a {tone} way: {sentence}
Correct the grammar of this sentence: {sentence}|Improve this text: {sentence}
Write a travel article about {place} that covers food, culture and sights.
Write an outline for an essay about {humtopic}.|Write an essay about the advantages and disadvantages of {thing}.
Write a {form} set in {place}.|Write a review of a restaurant in {place}.|Come up with a slogan for {purpose}.
Write a story that starts with the words "It was the last day of {month}".|Write a {length} story about...
Write a poem about...|Write an email to my...|Write a blog post about...|Compose a message to...|Write a speech for...
Help me write a letter to...|Write a product description for...|Create a story in which...|Write a scene where...
Write a persuasive essay on...|Describe a place where...|Write a dialogue between...|Draft an announcement that...""",
    "roleplay": """\
Act as {role} and {roletask}.|Pretend to be {role}. {Roletask}.|You are {role}. {Roletask}.
Imagine you are {role}. How would you {roletask2}?|I want you to act as {role}. My first request is: {roletask}.
Speak like {role} and explain {concept}.|As {role}, what do you think of {thing}?
Take the role of {role} and explain {tech} to {audience}.
Let's play a game: you are {role} and I am {role2}. You start.
You are {role} who has just arrived in {place}. Describe what you see.|Pretend you are {role} and describe...
Act as {role} and help me...|You are an interviewer for a {job} position. Ask me...
Imagine you are {role} and you have to...|Stay in character as {role}. What is...
Pretend that we meet in {place}. You are...|You are a customer and I am...""",
    "reasoning": """\
{puzzle}|{puzzle} Think step by step.|Here is a riddle: {puzzle}|Help me solve this: {puzzle}
Which is better, {thing} or {thing2}? Give reasons.|What would happen if there were no {thing}?
{name} wants to {everyday} but has no time. What should {name} do?|Compare {thing} and {thing2}.
Give arguments for and against {thing}.|If you could only keep one, {thing} or {thing2}, which would it be and why?
Suppose that...|If a man has...|There are three boxes...|Which of the following...|Imagine that all...
What would happen if...|Is it true that...|Why is it that...|You have two...|What is the difference between...""",
    "math": """\
{wordproblem}|{wordproblem} Show your work.|Solve this problem step by step: {wordproblem}|Solve for x: {equation}
Solve the equation {equation}.|What is {n} times {m}?|What is {nn} divided by {k}?|Calculate {n} + {m} * {k}.
What is the square root of {sq}?|Simplify the fraction {n}/{nn}.|Convert {n} miles to kilometres.
Find the derivative of {k}x^{k2} + {m}x.|What is the integral of {k}x^2?|What are the prime factors of {nn}?
What is the sum of the first {n} natural numbers?|Explain the Pythagorean theorem with an example.
Explain how to compute the mean, median and mode.|What is the volume of a cube with a side of {k} cm?
Find the slope of the line through ({k}, {m}) and ({n}, {nn}).|Solve:...|Calculate the...|A student has...
Find the value of...|How many ways...|If f(x) =...|Prove that...|The area of a...|What is the probability...
Let x be...|A store sells...""",
    "coding": """\
Write a {language} function that {codetask}.|Write a {language} program that {codetask}.
Implement a function in {language} that {codetask}.|How do I write {language} code that {codetask}? Explain each step.
Write {language} code that {codetask} and add comments.|Explain {tech} to {audience}.
What is {tech} and how does it work?|What is the difference between {tech} and {tech2}?|Explain loops in {language}.
How do I handle errors in {language}?|Write unit tests for a function that {codetask}.
What are the advantages of {language} over {language2}?
Write a SQL query that lists all customers from {city} who bought {item} in {year}.|Write an HTML page for {purpose}.
Write a regular expression that matches {d2}.|Here is a {language} function that {codetask}. How can I make it faster?
What is the time complexity of an algorithm that {codetask}?|Implement a function in {language} that...
Write a {language} script to...|Write a class in {language} that...|How can I use {language} to...
What does this code do:...|Fix the bug in this {language} code:...|Write a program that takes...
Explain how to install...|Given an array of integers,...|Write a function to find...|Design an algorithm for...""",
    "extraction": """\
Extract all names and places from the following text: {passage}
Summarise the following text in one sentence: {passage}
{passage} Who is mentioned in this text, and where does it take place?
Extract the numbers from this text as a list: {passage}|Read the text and answer: what is it about? Text: {passage}
Turn the following text into a JSON object: {passage}|List the key facts: {passage}
Is the tone of this text positive, negative or neutral? {passage}|Translate this into {text2}: {sentence}
Rewrite this as {text2}: {passage}|Given the text below, list the people, dates and amounts.|{passage}
What is the main idea of this passage?|{passage}
Classify each of these as an animal, a place or an object: {item}, {city}, {thing}, {item2}.
Identify the nouns and verbs in: {sentence}|Sort these words alphabetically: {item}, {item2}, {item3}, {thing}.
Rate this review from 1 to 5: {passage}|Make a table of the facts in this text: {passage}
Extract the names from the following text:...|Summarise this article:...|Read the following paragraph and...
Find the main points of this text:...|List all the dates in the following:...
Analyse the following customer reviews:...|Classify the following sentences:...|Given these categories,...
From the text below, identify...""",
    "stem": """\
Explain {concept} to {audience}.|What is {concept}?|How does {concept} work?|Explain {concept} in simple words.
Why is {concept} important?|Describe the main ideas behind {concept} and give an example.
What are common misconceptions about {concept}?|How was {concept} discovered?
What is the relation between {concept} and {concept2}?|Give me three facts about {concept}.
Describe an experiment that shows {concept}.|How do engineers make use of {concept}?
Summarise what we know about {concept}.|Explain how {concept} affects daily life.
What is the role of {concept} in nature?|Explain how...|What is the process of...|What are the main causes of...
How do scientists...|Why do planets...|What happens when...|How does the human body...|Describe the structure of...
What is the function of...|Why is the sky...|What are the properties of...|How would you build...""",
    "humanities": """\
What were the main causes of {humtopic}?|Explain {humtopic} to {audience}.|What is {humtopic}?
Give a short history of {humtopic}.|How did {humtopic} change the world?|Compare {humtopic} and {humtopic2}.
What can we learn from {humtopic}?|Write a summary of {humtopic}.|Who were the key figures of {humtopic}?
Discuss the effects of {humtopic} on society.|What are the main criticisms of {humtopic}?
How would you teach {humtopic} in one lesson?|List five important facts about {humtopic}.
Why does {humtopic} still matter today?|Discuss how...|What role did...|Who was...|Why did the...
Explain the significance of...|What is the meaning of...|How did people in ancient...|What are the ethical...
Compare the views of...|When did...|What is the history of...|Which country...""",
    "everyday": """\
How do I {everyday}?|How can I {everyday}?|Give me tips to {everyday}.|What is the best way to {everyday}?
Make a plan to {everyday} in {k} weeks.|I want to {everyday}. Where should I start?|Give me {k} ideas to {everyday}.
What should I see in {place}?|Plan a {k}-day trip to {place}.|What are the benefits of {thing}?
Recommend a recipe with {k} ingredients.|Suggest a name for {purpose}.|What is the capital of {place}?
Tell me a joke about {thing}.|What are some healthy breakfast ideas?|Can you recommend books about {humtopic}?
Make a shopping list for a dinner for {k} people.|Tell me something about {place}.
I feel {tone2} today. What should I do?|Hello! Who are you?|What can you do for me?|Hi, can you help me {everyday}?
Give me a daily routine to {everyday}.|What should I do if...|How can I...|Can you recommend...
I have a problem with...|What are the best...|Give me some ideas for...|My friend...|I would like to...|Do you know...
Please tell me...|Can you explain...|I am planning...|What is the best way to...|Tell me about...|List the top...
Create a plan for...""",
}
"""First messages by category."""

FOLLOW_UPS = """\
Can you explain that in simpler words?|Give me an example.|Can you make it shorter?|Now rewrite it in a {tone} tone.
Why is that?|What else should I know?|Can you summarise that in one sentence?|Now do the same for {thing}.
Thank you! Can you add more detail?|Turn your answer into a list.|Are you sure? Check your answer.
What are the disadvantages?|Translate your answer into {text2}.|Explain it to {audience}.
What would {role} say about it?|And how does this relate to {concept}?|Can you give me three more ideas?
Now write it as a {form}.|Start every sentence with a new letter.|Which part is the most important?|Can you...
What about...|How does that...|Now write..."""
"""Second messages."""

MANNERS = """\
Keep it short.|Use simple language.|Explain your reasoning.|Answer in {k} sentences.|Use bullet points.
Think step by step.|Give examples.|Be specific.|Write at most {hundreds} words.|Make it {tone}.
Explain it to {audience}.|Please be brief.|Give {k} points.|Answer as {role} would.|Mention {thing}.
Include an example from {place}.|Use a numbered list.|End with a question.|Thank you!|Avoid technical terms.
Give a detailed answer.|Write it for {audience}.|Only give the answer."""
"""What may be added to a whole first message."""
