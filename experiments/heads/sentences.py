"""Forty plain sentences on many things, for the next-token loss: twenty to rank heads on, twenty to measure."""

SENTENCES = """
The train to the coast was late again, so we missed the last ferry to the island.
Most bats find their way in the dark by listening to the echoes of their own calls.
He put the letter back into the drawer and never spoke about it to anyone.
The new bridge across the river was opened by the mayor on a rainy Saturday morning.
Boil the potatoes for twenty minutes, then mash them with butter, milk and a pinch of salt.
In winter the lake freezes over, and the children of the village skate on it after school.
The company said that its profits had fallen because the price of oil had risen.
She learned to play the violin when she was six years old and gave her first concert at ten.
If you want to save energy, turn off the lights when you leave the room.
The old man sat on a bench in the park and fed the pigeons with dry bread.
Water is made of two elements, hydrogen and oxygen, and covers most of the surface of the earth.
The court decided that the law was not in line with the constitution.
After the storm, many houses in the town were without power for several days.
My sister works as a nurse in a hospital and often has to stay there over night.
The team lost the final by one goal, although they had the ball for most of the game.
A good book can take you to another world without leaving your chair.
The museum shows paintings from the nineteenth century and is closed on Mondays.
The farmer drove his tractor through the field while the dog ran behind him.
Before the invention of printing, books were copied by hand, which took a very long time.
They moved to a small house in the country because the city had become too expensive.
The moon turns around the earth once in about a month and always shows us the same side.
When the bell rang, the students packed their bags and ran out of the classroom.
The doctor told him to drink more water and to go to bed earlier.
In the middle of the square stands a statue of a general on a horse.
Many birds fly south in autumn, since they find little to eat in the cold months.
The price of the ticket includes a guided tour and a cup of coffee in the cafe.
She opened the window, and the smell of fresh grass filled the kitchen.
The police asked everybody who had seen the accident to call the station.
A computer stores information as long rows of zeros and ones.
The soup was too hot, so he waited a few minutes before he began to eat.
Scientists have found that trees can warn each other of insects through the air.
The king had three daughters, and the youngest of them was the most clever.
On the way home it began to snow, and soon the road could not be seen any more.
The government plans to build ten thousand new flats within the next five years.
Please read the instructions carefully before you use the machine for the first time.
The wolf is the ancestor of all dogs, from the smallest to the largest.
He wrote his name on a piece of paper and handed it to the woman behind the desk.
The mountain is so high that there is snow on its top even in summer.
At the market you can buy fruit, vegetables, cheese and fish from the region.
Light travels so fast that it takes only eight minutes from the sun to the earth.
""".strip().splitlines()

RANKED, MEASURED = SENTENCES[::2], SENTENCES[1::2]
