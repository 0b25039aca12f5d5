"""What can stand in a scene: the objects with their categories, the themes they come in, the colours, the sizes."""

from types import MappingProxyType

SIDE = 72
"""Height and width of a scene in pixels."""

ROW = 9
"""Height in pixels of the rows by which a caption reads a picture."""

SIZES = (10, 19)
"""Smallest and largest length of an object's longer side in pixels."""

_CATEGORIES = {
    "animal": ("bear", "bird", "cat", "chicken", "cow", "crab", "dog", "fish", "fox", "pig"),
    "vehicle": ("bicycle", "boat", "bus", "car", "rocket", "tractor", "truck"),
    "food": ("bread", "cake", "cheese", "corn", "pizza", "tomato"),
    "nature": ("moon", "mushroom", "shell", "star", "tree"),
    "thing": (
        "balloon",
        "bed",
        "book",
        "chair",
        "clock",
        "drum",
        "gift",
        "guitar",
        "kite",
        "knife",
        "tent",
        "umbrella",
    ),
}

CATEGORY: MappingProxyType[str, str] = MappingProxyType(
    {name: category for category, names in _CATEGORIES.items() for name in names}
)
"""The category of every object: `CATEGORY["dog"] == "animal"`."""

NAMES: tuple[str, ...] = tuple(sorted(CATEGORY))
"""The names of all objects, sorted; each is one word."""

CATEGORIES: tuple[str, ...] = tuple(_CATEGORIES)
"""The names of the categories."""

THEMES: MappingProxyType[str, tuple[str, str, str, str, str]] = MappingProxyType(
    {
        "farm": ("cow", "pig", "tractor", "corn", "chicken"),
        "street": ("car", "bus", "dog", "bicycle", "truck"),
        "kitchen": ("cheese", "knife", "pizza", "tomato", "bread"),
        "beach": ("boat", "fish", "umbrella", "crab", "shell"),
        "party": ("cake", "gift", "guitar", "drum", "balloon"),
        "forest": ("tree", "mushroom", "fox", "bear", "tent"),
        "home": ("bed", "chair", "clock", "book", "cat"),
        "sky": ("moon", "star", "rocket", "kite", "bird"),
    }
)
"""Objects that appear together. In each theme the first two and the next two are partners."""

THEME_WEIGHTS: MappingProxyType[str, int] = MappingProxyType(
    {"farm": 6, "street": 5, "kitchen": 4, "beach": 4, "party": 3, "forest": 3, "home": 2, "sky": 2}
)
"""How often a theme is drawn, relative to the others; unequal, so that some objects are popular."""

PARTNER: MappingProxyType[str, str] = MappingProxyType(
    {
        name: other
        for names in THEMES.values()
        for pair in (names[0:2], names[2:4])
        for name, other in (pair, pair[::-1])
    }
)
"""The object that usually stands beside another one."""

COLOURS: MappingProxyType[str, tuple[int, int, int]] = MappingProxyType(
    {
        "red": (196, 72, 72),
        "orange": (222, 148, 72),
        "yellow": (224, 208, 96),
        "green": (96, 164, 96),
        "blue": (88, 128, 204),
        "purple": (150, 100, 184),
        "gray": (140, 140, 140),
        "white": (232, 232, 232),
    }
)
"""The colours of backgrounds, as red, green, blue from 0 to 255."""
