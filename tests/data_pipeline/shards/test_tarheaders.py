"""Archives: every cut and every damaged header is noticed or changes nothing; what writers really write is read."""

from __future__ import annotations

import io
import subprocess
import tarfile
from pathlib import Path

import pytest

from data_pipeline.errors import DataError
from data_pipeline.shards.tarheaders import BLOCK, Window, read_members
from data_pipeline.shards.tarscan import ScannedSample, scan_tar
from tests.data_pipeline.tars import picture

PICTURE = picture(8, 8, "PNG")
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def archive(format: str = "ustar", count: int = 3, prefix: str = "s") -> bytes:
    """Samples of a text and a picture; the names of `gnu` and `pax` need extended headers."""
    buffer, folder = io.BytesIO(), "" if format == "ustar" else "é" * 120 + "/"
    with tarfile.open(fileobj=buffer, mode="w", format=FORMATS[format]) as tar:
        for number in range(count):
            for extension, data in (("json", b'{"number": %d}' % number), ("0.png", PICTURE)):
                info = tarfile.TarInfo(f"{folder}{prefix}{number}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def scan(data: bytes) -> list[ScannedSample] | str:
    """The samples, or the error."""
    try:
        return list(scan_tar(io.BytesIO(data), len(data), "x.tar"))
    except DataError as error:
        return str(error)


def headers(data: bytes) -> list[int]:
    """Offsets of all header blocks, extended ones included, as Python's tarfile finds them."""
    found = []
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for info in tar:
            end = info.offset_data
            while end > info.offset:  # the blocks between are headers and their names
                end -= BLOCK
                if data[end + 257 : end + 262] == b"ustar":
                    found.append(end)
    return sorted(found)


def end_of(data: bytes) -> int:
    """Where the end-of-archive mark begins."""
    return -(-len(data.rstrip(b"\0")) // BLOCK) * BLOCK


def keys(data: bytes) -> list[str]:
    found = scan(data)
    assert not isinstance(found, str), found
    return [sample.key for sample in found]


@pytest.mark.parametrize("format", FORMATS)
def test_every_cut_is_noticed_or_harmless(format: str) -> None:
    data = archive(format)
    whole, end = scan(data), end_of(data)
    assert len(whole) == 3
    for cut in range(0, end + 3 * BLOCK, 1 if format == "ustar" else 7):
        found = scan(data[:cut])
        if isinstance(found, str):
            assert found.startswith("x.tar: "), cut
            assert cut < end + BLOCK, f"{cut}: {found}"
        else:
            assert found == whole, cut
            assert cut >= end + BLOCK, f"{cut}: no end mark"


@pytest.mark.parametrize("format", FORMATS)
def test_every_flipped_header_byte_is_noticed_or_harmless(format: str) -> None:
    data = archive(format)
    whole, noticed = scan(data), 0
    places = [begin + byte for begin in headers(data) for byte in range(BLOCK)]
    assert len(places) == (6 if format == "ustar" else 12) * BLOCK
    for place in places:
        damaged = bytearray(data)
        damaged[place] ^= 1 << place % 8
        found = scan(bytes(damaged))
        assert isinstance(found, str) or found == whole, place
        noticed += isinstance(found, str)
    assert noticed > 0.98 * len(places)


def test_a_hole_of_zeros_is_not_the_end() -> None:
    data = archive()
    holes = [(begin, begin + count * BLOCK) for begin in headers(data) for count in (1, 2, 3, 4, 8)]
    for begin, end in holes:
        if end < end_of(data):
            found = scan(data[:begin] + bytes(end - begin) + data[end:])
            assert isinstance(found, str), (begin, end)


def test_errors_name_shard_place_and_samples_before_it() -> None:
    data = archive()
    begin = headers(data)[4]
    found = scan(data[:begin])
    assert found == (
        f"x.tar: the file ends without an end-of-archive mark (byte {begin:,}, after 2 samples, the last one 's1'); "
        "write or download the shard again, or, if no sample is missing, end it by `head -c 1024 /dev/zero >> x.tar`"
    )
    assert keys(data[:begin] + bytes(1024)) == ["s0", "s1"]


def test_archives_that_were_joined_are_read_on(caplog: pytest.LogCaptureFixture) -> None:
    one, two, end = archive(), archive("pax", prefix="t"), end_of(archive())
    bare = two[: end_of(two) + 2 * BLOCK]  # of a writer that adds no padding
    assert [key[-2:] for key in keys(one + two)] == ["s0", "s1", "s2", "t0", "t1", "t2"]
    joined = "x.tar: read as 2 archives that were joined; if it was written as one, it is damaged before byte 10240"
    assert caplog.messages == [joined]
    assert len(keys(one[: end + 2 * BLOCK] + bare)) == 6
    assert len(keys(one + bytes(10 * BLOCK))) == 3
    assert "comes twice" in str(scan(one + one))
    for data, problem in (
        (one[: end + 2 * BLOCK] + two, "1,024 zero bytes with more data behind them"),
        (one[: end + 3 * BLOCK] + two, "1,536 zero bytes with more data behind them"),
        (one + b"signed by somebody".ljust(BLOCK), "what lies behind the end-of-archive mark is not another archive"),
        (one + bytes(1 << 21), "are no padding but lost data"),
    ):
        assert problem in str(scan(data))


def member(name: bytes, size: bytes, kind: bytes = b"0") -> bytes:
    """A header block with a valid checksum."""
    block = bytearray(tarfile.TarInfo("x").tobuf(tarfile.USTAR_FORMAT))
    block[:100], block[124:136], block[156:157] = name.ljust(100, b"\0"), size, kind
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


HUGE = (1 << 40).to_bytes(12, "big")
HUGE = bytes([HUGE[0] | 0x80]) + HUGE[1:]


@pytest.mark.parametrize(
    ("damaged", "problem"),
    [
        (member(b"a.txt", (-5).to_bytes(12, "big", signed=True)), "'a.txt' has the size -5"),
        (member(b"a.txt", b"-0000000005\0"), "'a.txt' has the size -5"),
        (member(b"a.txt", HUGE), "'a.txt' of 1,099,511,627,776 bytes is cut off"),
        (member(b"././@LongLink", HUGE, b"L"), "an extended header of 1,099,511,627,776 bytes"),
        (member(b"pax", b"00010000000\0", b"x") + bytes(1 << 21), "an extended header of 2,097,152 bytes"),
        (member(b"pax", b"00000000011\0", b"x") + b"9 size=-1".ljust(BLOCK, b"\0"), "a pax header is damaged"),
        (member(b"pax", b"00000000013\0", b"x") + b"11 size=-1\n".ljust(BLOCK, b"\0") + member(b"a.txt", b"0" * 12),
         "a pax header states the size '-1'"),
        (member(b"pax", b"00000000011\0", b"x") + b"9 path=a\n".ljust(BLOCK, b"\0"), "a header is damaged"),
        (member(b"a.txt", b"0" * 12, b"S"), "'a.txt' is sparse"),
        (b"\x1f\x8b compressed".ljust(BLOCK), "not a tar archive; compressed ones are unpacked first"),
        (b"", "ends without an end-of-archive mark"),
    ],
)  # fmt: skip
def test_sizes_that_cannot_be_are_refused(damaged: bytes, problem: str) -> None:
    assert problem in str(scan(damaged + bytes(1024) if damaged else b""))


def test_names_that_are_not_utf8_are_read_as_latin_1() -> None:
    data = member(b"caf\xe9.txt", b"0" * 12) + member("ф.txt".encode(), b"0" * 12) + bytes(1024)
    assert keys(data) == ["café", "ф"]


def test_names_are_one_line() -> None:
    data = member(b"a\n\x1b[31mb.txt", b"0" * 12) + member("\u2028c%.txt".encode(), b"0" * 12) + bytes(1024)
    assert keys(data) == ["a%0A%1B[31mb", "%2028c%"]


def test_members_are_those_that_tarfile_finds() -> None:
    for format in FORMATS:
        data = archive(format)
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            expected = [(info.name, info.offset_data, info.size) for info in tar]
        assert [(m.name, m.data, m.size) for m in read_members(Window(io.BytesIO(data), len(data)))] == expected


def test_meta_data_are_no_samples() -> None:
    names = ("__a.json", "b/__c__.json", "__d__/e.json", "__f__", "g/h.json", ".i.json", "j/__k__/l.json")
    data = b"".join(member(name.encode(), b"0" * 12) for name in names) + bytes(1024)
    assert keys(data) == ["__a", "g/h", "j/__k__/l"]


def test_gnu_tars_own_archives_are_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "in" / ("long" * 40)).mkdir(parents=True)
    for name in ("a.txt", "b.txt", f"{'long' * 40}/c.txt"):
        (tmp_path / "in" / name).write_text(name)
    (tmp_path / "in" / "d.txt").symlink_to("a.txt")
    (tmp_path / "in" / "e.txt").hardlink_to(tmp_path / "in" / "a.txt")
    times = ["--format=gnu", "-g", "times"]  # where other formats have the prefix of a name
    for options in ([], times, ["--format=posix"], ["--format=oldgnu", "-b", "1"], ["--format=pax", "-b", "128"]):
        subprocess.run(["tar", *options, "--sort=name", "-cf", "out.tar", "-C", "in", "."], cwd=tmp_path, check=True)
        assert keys((tmp_path / "out.tar").read_bytes()) == ["a", "b", f"{'long' * 40}/c"]
    links = "x.tar: left out 2 link(s); tar -h --hard-dereference archives files in their place"
    assert caplog.messages == [links] * 5
