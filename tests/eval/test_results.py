"""Results are found by the names that tools give them."""

from pathlib import Path

import pytest
from PIL import Image

from eval.results import by_name, find_results, judged_part

SOURCES, TARGETS = ["face_2", "face_10"], ["hat", "red_hair"]


def save(path: Path, size: tuple[int, int] = (8, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path)


@pytest.mark.parametrize(
    ("layout", "names"),
    [
        ("targetclip", ["hat/face_2.png", "hat/face_10.jpg", "red_hair/face_10.png"]),
        (
            "targetclip transfer",
            ["hat/edited_face_2.png", "hat/edited_face_10.png", "red_hair/edited_face_10.png"],
        ),
        (
            "StyleCLIP",
            [
                "hat/inference_results/00000.jpg",
                "hat/inference_results/00001.jpg",
                "red_hair/inference_results/00001.jpg",
            ],
        ),
        ("DeltaEdit", ["hat/0001.jpg", "hat/0002.jpg", "red_hair/0002.jpg"]),
        (
            "HairFastGAN",
            ["face_2_hat_hat.png", "face_10_hat_hat.png", "face_10_red_hair_red_hair.png"],
        ),
    ],
)
def test_each_tool_is_known_by_its_names(layout: str, names: list[str], tmp_path: Path) -> None:
    for name in [*names, "grid.png"]:
        save(tmp_path / name)
    found = find_results(tmp_path, SOURCES, TARGETS)
    assert found.layout == layout and found.name == tmp_path.name
    pairs = [("hat", "face_2"), ("hat", "face_10"), ("red_hair", "face_10")]
    assert found.files == dict(zip(pairs, [tmp_path / name for name in names], strict=True))
    assert found.missing == ["red_hair/face_2"] and found.surplus == ["grid.png"]
    assert found.seconds is None


def test_a_table_names_results_wherever_they_are(tmp_path: Path) -> None:
    save(tmp_path / "far" / "1.png")
    save(tmp_path / "2.png")
    table = tmp_path / "theirs.csv"
    table.write_text(
        "result,target,source,note\n"
        "far/1.png,hat.png,faces/face_2.jpg,\n"
        f"{tmp_path / '2.png'},red_hair,face_2,\n"
        "gone.png,hat,face_10,\n"
        "2.png,nobody,face_2,\n"
    )
    found = find_results(table, SOURCES, TARGETS)
    assert (found.name, found.layout) == ("theirs", "table")
    assert found.files == {
        ("hat", "face_2"): tmp_path / "far" / "1.png",
        ("red_hair", "face_2"): tmp_path / "2.png",
    }
    assert found.missing == ["hat/face_10", "red_hair/face_10"] and found.surplus == ["2.png"]


def test_seconds_are_those_of_the_folder(tmp_path: Path) -> None:
    save(tmp_path / "hat" / "face_2.png")
    (tmp_path / "seconds.txt").write_text("1.5\n")
    assert find_results(tmp_path, SOURCES, TARGETS).seconds == 1.5
    for text in ("fast", "-1", "nan"):
        (tmp_path / "seconds.txt").write_text(text)
        with pytest.raises(ValueError, match=f"expected the seconds of a result, found '{text}'"):
            find_results(tmp_path, SOURCES, TARGETS)


def test_pictures_are_known_by_their_names_in_natural_order(tmp_path: Path) -> None:
    for name in ("face_10.png", "face_2.png"):
        save(tmp_path / name)
    assert list(by_name("--sources", tmp_path)) == SOURCES


def test_of_pictures_in_a_row_the_last_is_the_result() -> None:
    source, row = Image.new("RGB", (8, 8)), Image.new("RGB", (24, 8), "red")
    row.paste("lime", (16, 0, 24, 8))
    assert judged_part(row, source).getcolors() == [(64, (0, 255, 0))]
    assert judged_part(row, row) is row
    large = Image.new("RGB", (64, 64))
    assert judged_part(large, source) is large
