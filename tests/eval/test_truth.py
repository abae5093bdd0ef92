"""What targets show as readings, and the right answer in the generator's style."""

import json
from pathlib import Path

import pytest
import torch

from data.illustrated.codes import ATTRIBUTES, HAIR_COLOURS, NONE, STYLE, visible
from data.illustrated.shown import Shown, word_of
from data.targets import draw_avatar, face_at
from eval.reader import NAMES, READINGS, SPANS, load_reader
from eval.truth import Content, face_of, read_truth, truth_of, with_essence


def face(**values: str) -> tuple[int, ...]:
    """A face by the values of some attributes; the others have their first."""
    return tuple(a.values.index(values.get(a.name, a.values[0])) for a in ATTRIBUTES)


def values(indices: tuple[int, ...]) -> dict[str, str]:
    return {a.name: a.values[i] for a, i in zip(ATTRIBUTES, indices, strict=True)}


def seen_of(content: Content) -> set[str]:
    (seen,) = truth_of([content]).seen
    return {reading.name for reading in READINGS if seen[reading.start]}


BOB = face(top="bob", hairColor=HAIR_COLOURS["green"], skinColor="#614335", clothes="overall")


def test_of_a_face_of_the_generator_all_counts_that_its_picture_shows() -> None:
    hat, shades = face(top="turban"), face(top="bob", accessories="sunglasses")
    assert seen_of(BOB) == set(NAMES) - {"hatColor"}
    assert seen_of(hat) == set(NAMES) - {"hairColor"}
    assert seen_of(shades) == set(NAMES) - {"hatColor", "eyes", "eyebrows"}
    (readings,) = truth_of([BOB]).readings
    for name, value in values(BOB).items():
        known = ATTRIBUTES[NAMES.index(name)].values
        assert known[int(readings[SPANS[name]].argmax())] == value


def test_of_another_style_what_is_there_and_the_colour_of_hair_count() -> None:
    worn = Shown(glasses="sunglasses", moustache="moustache", hat="cap", hat_colour="red")
    bearded = Shown(beard="goatee", hair="mohawk", hair_colour="pink")
    assert seen_of(worn) == {"glasses", "hat"}  # a moustache is no beard, and none is not said
    assert seen_of(bearded) == {"glasses", "hat", "beard", "hairColor"}
    first, second = truth_of([worn, bearded]).readings
    assert first[SPANS["glasses"]].tolist() == first[SPANS["hat"]].tolist() == [0, 1]
    assert second[SPANS["beard"]].tolist() == [0, 1] and second[SPANS["hat"]].tolist() == [1, 0]
    assert list(HAIR_COLOURS)[int(second[SPANS["hairColor"]].argmax())] == "pink"


def test_a_part_is_of_the_same_targets() -> None:
    whole = truth_of([BOB, Shown(), face(top="turban")])
    part = whole.part(slice(1, 3))
    assert part.contents == whole.contents[1:]
    assert torch.equal(part.readings, whole.readings[1:])
    assert torch.equal(part.seen, whole.seen[1:])


# Files

SAID = {"glasses": "sunglasses", "beard": "", "hat": "", "hair_colour": "pink"}


def test_a_file_says_what_pictures_show(tmp_path: Path) -> None:
    assert read_truth(tmp_path) == ({}, frozenset())
    rows = {
        "a.png": {**SAID, "style": "micah", "held_out": True},
        "b.png": {**SAID, "beard": "goatee"},
    }
    (tmp_path / "truth.json").write_text(json.dumps(rows))
    expected = {"a.png": Shown("sunglasses", hair_colour="pink")}
    expected["b.png"] = Shown("sunglasses", "goatee", hair_colour="pink")
    assert read_truth(tmp_path) == (expected, {"a.png"})
    (tmp_path / "truth.json").unlink()
    names = ["file", "style", "held_out", *SAID]
    lines = [
        names,
        ["a.png", "micah", "True", *SAID.values()],
        ["b.png", "", "", "sunglasses", "goatee", "", "pink"],
    ]
    (tmp_path / "truth.csv").write_text("\n".join(",".join(line) for line in lines) + "\n")
    assert read_truth(tmp_path) == (expected, {"a.png"})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a table of what pictures show"),
        ("[1]", "expected the attributes of each picture, by its file name"),
        ('{"a.png": 3}', "expected the attributes of each picture"),
        (json.dumps({"a.png": {"glasses": ""}}), "a.png: .*found no beard"),
        (
            json.dumps({"a.png": {**SAID, "hatt": ""}}),
            "unknown attribute 'hatt': did you mean 'hat'",
        ),
        (json.dumps({"a.png": {**SAID, "beard": "yes"}}), "beard: .*one of beard, .*found 'yes'"),
        (json.dumps({"a.png": {**SAID, "hair_colour": "pnk"}}), "did you mean 'pink'"),
        (json.dumps({"a.png": {**SAID, "hat": True}}), "hat: .*found True"),
    ],
)
def test_what_is_no_truth_is_refused_in_one_line(
    tmp_path: Path, content: str, message: str
) -> None:
    (tmp_path / "truth.json").write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_truth(tmp_path)
    assert "\n" not in str(caught.value)
    (tmp_path / "truth.csv").write_text("file\n")
    with pytest.raises(ValueError, match="found both: remove one"):
        read_truth(tmp_path)


def test_a_face_is_read_in_the_generators_style_alone() -> None:
    reader, values = load_reader(), face_at(5, 3)
    seen = face_of(reader, draw_avatar("avataaars", 5, 3).resize((200, 200)))
    assert seen is not None
    shows = visible(torch.tensor([values]))[0]
    assert torch.tensor(seen)[shows].tolist() == torch.tensor(values)[shows].tolist()
    for kind in ("styles", "held-out"):
        for i in range(4):
            assert face_of(reader, draw_avatar(kind, 5, i)) is None


# The right answer


def test_the_right_answer_keeps_who_it_is_and_brings_the_essence_of_a_face() -> None:
    target = face(top="turban", facialHair="beardLight", skinColor="#ffdbb4", clothes="hoodie")
    answer, own, theirs = (values(f) for f in (with_essence(BOB, target), BOB, target))
    for attribute in ATTRIBUTES:
        wanted = theirs if attribute.essence else own
        assert answer[attribute.name] == wanted[attribute.name]
    assert with_essence(BOB, BOB) == BOB


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (Shown(), {"accessories": NONE, "facialHair": NONE, "top": "bob"}),
        (Shown(glasses="round glasses"), {"accessories": "round"}),
        (Shown(hair="bald"), {"top": NONE}),
        (Shown(hair="afro", hair_colour="blue"), {"top": "fro", "hairColor": HAIR_COLOURS["blue"]}),
        (Shown(hair="bob"), {"top": "bob"}),
        # Nothing of that name: the own hair, and the nearest of a kind.
        (Shown(hair="mohawk"), {"top": "bob"}),
        (Shown(hat="cap", hat_colour="blonde"), {"top": "hat", "hatColor": "#f7c948"}),
        (Shown(beard="goatee"), {"facialHair": "beardLight"}),
        (Shown(moustache="moustache"), {"facialHair": "moustacheFancy"}),
        (Shown(mouth="tongue"), {"mouth": "tongue"}),
    ],
)
def test_another_style_is_drawn_in_that_of_the_generator(
    shown: Shown, expected: dict[str, str]
) -> None:
    answer = values(with_essence(BOB, shown))
    assert answer == values(BOB) | {"accessories": NONE, "facialHair": NONE} | expected


@pytest.mark.parametrize("shown", [Shown(hair_colour="pink"), Shown(hair="mohawk")])
def test_a_hat_goes_where_the_target_shows_hair_that_the_style_has_not(shown: Shown) -> None:
    answer = values(with_essence(face(top="turban"), shown))
    assert word_of(STYLE, "top", answer["top"]) == "short hair"
