"""Device maps as JSON: what users write, and what is wrong with it in one line."""

import json
import os
import stat

import pytest

from balance_shim import map_file
from balance_shim.errors import DeviceMapError


def test_values_in_every_form():
    """Indices, device names of any accelerator, cpu and disk are read; indices come out as integers."""
    text = '{"a": 1, "b": "cuda:2", "c": "npu:3", "d": "cpu", "e": "disk", "f": "4", "g": "cuda", "h": "CUDA:0"}'
    expected = {"a": 1, "b": 2, "c": 3, "d": "cpu", "e": "disk", "f": 4, "g": 0, "h": 0}
    assert map_file.read(text).entries == expected


def test_a_file_is_read_with_or_without_byte_order_mark(tmp_path):
    """Files written on Windows start with a byte order mark."""
    path = tmp_path / "map.json"
    path.write_bytes(b'\xef\xbb\xbf{"": 0}')
    assert map_file.read(str(path)).entries == {"": 0}


def test_a_written_map_is_read_back(tmp_path):
    """What the shim writes is what it reads, and a plain dict to everybody else."""
    device_map = {"model.embed_tokens": 0, "model.layers.0": 1, "lm_head": "cpu"}
    path = tmp_path / "map.json"
    map_file.write(device_map, str(path))
    assert map_file.read(str(path)).entries == json.loads(path.read_text()) == device_map
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a": 0,\n "b": }', "line 2 column 7"),
        ("{", "not JSON, line 1 column 2"),
        ('["a"]', "not a list"),
        ("{}", "the map is empty"),
        ('{"a": true}', "'a' is mapped to true"),
        ('{"a": -1}', "'a' is mapped to -1"),
        ('{"a": 1.5}', "'a' is mapped to 1.5"),
        ('{"a": null}', "'a' is mapped to null"),
        ('{"a": "gpu one"}', "'a' is mapped to \"gpu one\""),
        ('{"a": {"b": 1}}', "'a' is mapped to an object"),
        ('{"a": "cuda:x"}', "'a' is mapped to \"cuda:x\""),
        ('{"a": "cpu:0"}', "'a' is mapped to \"cpu:0\""),
        ('{"a": "what ever:1"}', "'a' is mapped to \"what ever:1\""),
        pytest.param('{"a": ' + "9" * 5000 + "}", "cannot be parsed as JSON", id="huge"),
        ('{"a": 0, "a": 1}', "'a' is given twice, for 0 and for 1"),
        ("[" * 100_000, "nested too deep"),
    ],
)
def test_bad_json_in_one_line(text, expected):
    """What is wrong, where, and nothing else."""
    with pytest.raises(DeviceMapError) as caught:
        map_file.read(text)
    message = str(caught.value)
    assert expected in message and message.startswith("BALANCE_DEVICE_MAP") and "\n" not in message


def test_unreadable_files_in_one_line(tmp_path):
    """A missing file, a folder, bytes that are no text."""
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name, expected in [("missing.json", "No such file"), ("", "is a folder"), ("binary", "not a text file")]:
        with pytest.raises(DeviceMapError, match=expected) as caught:
            map_file.read(str(tmp_path / name))
        assert "\n" not in str(caught.value)
    with pytest.raises(DeviceMapError, match="cannot be read"):
        map_file.read("a\0b.json")


def test_what_has_no_end_is_not_waited_for(tmp_path):
    """A named pipe, a device and a file too large for a map are refused, not read."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_text(" " * (map_file.LARGEST_FILE + 1))
    cases = [(tmp_path / "pipe", "not a regular"), ("/dev/zero", "not a regular"), (tmp_path / "large", "larger")]
    for path, expected in cases:
        with pytest.raises(DeviceMapError, match=expected):
            map_file.read(str(path))


def test_a_strange_path_stays_one_short_line():
    """Line breaks and thousands of characters in a path do not spill over the screen."""
    for text in ("no\nsuch", "x" * 100_000):
        with pytest.raises(DeviceMapError) as caught:
            map_file.read(text)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_what_is_no_file_is_written_to(tmp_path):
    """A pipe gets the map, as /dev/stdout would, and is a pipe afterwards: root could replace it, and /dev/null."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
    map_file.write({"": 0}, str(pipe))
    assert json.loads(os.read(reader, 1000)) == {"": 0} and stat.S_ISFIFO(os.stat(pipe).st_mode)
    os.close(reader)


def test_a_link_goes_on_pointing_to_the_file(tmp_path):
    """Where the user has put a link, the file behind it is written."""
    (tmp_path / "link").symlink_to(tmp_path / "file")
    map_file.write({"": 0}, str(tmp_path / "link"))
    assert (tmp_path / "link").is_symlink() and json.loads((tmp_path / "file").read_text()) == {"": 0}
