"""The words of the generated tasks: names for things, and words of five kinds."""

NAMES = """
anchor apple basket bottle bridge button candle carpet castle copper cotton desert diamond
dragon engine feather finger forest garden guitar hammer harbor helmet island jacket kettle
ladder lantern lemon letter mirror monkey mountain needle orange palace pencil pepper piano
pillow planet pocket rabbit ribbon river rocket saddle shadow silver spider statue sugar summer
table temple thunder ticket tiger tunnel turtle valley velvet violin wagon walnut window winter
wizard yellow zebra
"""
KINDS = {
    "animal": """
        horse dog cat tiger lion wolf bear sheep goat rabbit mouse monkey zebra eagle shark
        whale camel donkey pig cow duck goose snake frog
    """,
    "fruit": """
        apple banana orange lemon grape peach cherry mango melon plum pear apricot fig kiwi lime
        coconut papaya pineapple strawberry raspberry blueberry mandarin tangerine pomegranate
    """,
    "color": """
        red blue green yellow black white purple pink brown grey violet scarlet crimson beige
        turquoise indigo cyan magenta maroon teal lavender ivory golden silver
    """,
    "tool": """
        hammer saw drill wrench pliers screwdriver chisel axe shovel rake ladder knife file
        clamp anvil spade hoe crowbar mallet sickle scissors trowel hacksaw pickaxe
    """,
    "country": """
        France Spain Italy Germany Japan China India Brazil Canada Mexico Egypt Kenya Norway
        Poland Greece Chile Sweden Turkey Russia Peru Portugal Ireland Thailand Vietnam
    """,
}
LABELS = ("North", "South", "East", "West", "Center")
