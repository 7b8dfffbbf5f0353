"""Two short texts in plain English, for when no other text is given: one to measure a model's loss on, one to
see what its hidden states are like.
"""

SAMPLE = """\
The ferry leaves the island at ten past seven, and on most mornings the same people are on it. A \
nurse reads the paper from back to front. Two boys share one pair of headphones and argue about \
which song comes next. The man who repairs clocks carries a wooden box on his knees and looks at the \
water. When the weather is bad the crossing takes forty minutes instead of twenty-five, and nobody \
talks very much. In summer there are visitors, who stand at the rail and take pictures of gulls.

Bread needs only flour, water, salt and time. Mix the flour with most of the water and leave it \
alone for half an hour, so that it can soak. Then add the salt and the rest of the water, and fold \
the dough over itself a few times. It will be sticky at first. Every half hour, wet your hands and \
fold it again. After four hours it should be smooth and full of small bubbles. Shape it, let it rest \
in a cool place overnight, and bake it in the morning in a hot oven until the crust is dark brown. \
The hardest part is to wait until it has cooled.

A river does not run straight for long. Where the bank is soft the water cuts into it, and on the \
other side, where the current is slow, it drops the sand that it carries. So a small bend grows into \
a large one. In the end the neck of the loop is so narrow that a single flood breaks through, and \
the old loop becomes a lake in the shape of a new moon. Farmers know this well, because a field that \
lay on one side of the river in their grandfather's time may lie on the other side today, and nobody \
is quite sure who owns it.
"""

TEXT = """\
When the town decided to build a new library, there was a long discussion about where to put it. \
Some wanted it next to the station, where people pass every day. Others thought that a quiet street \
would be better for reading. An engineer explained that the ground near the station was wet and that \
a cellar there would be expensive. In the end they chose the old market hall. It had been empty for \
nine years. The roof was repaired, the walls were painted white, and long tables were set up under \
the windows. On the first day more than six hundred people came, and by the evening the shelf with \
the crime novels was nearly empty.

To find out how high a tree is, you need only a stick and a sunny day. Put the stick upright in the \
ground and measure its length and the length of its shadow. Then measure the shadow of the tree. If \
the shadow of the stick is twice as long as the stick, then the shadow of the tree is twice as long \
as the tree. The method is very old. A traveller is said to have measured a pyramid with it, and to \
have waited for the hour at which his own shadow was exactly as long as he was tall.
"""
