# SPDX-License-Identifier: Apache-2.0
"""A clip is one file, whatever its name and content say: nothing else is read and no address is asked."""

import os
import shutil
import socket
import struct
import threading
from pathlib import Path

import pytest

from feature_extractors import Clip, ClipError, decode
from feature_extractors.opening import FORMATS, PLAYLISTS

NAMES = (
    "12:30.mp4",
    "take:1.mp4",
    "http:x.mp4",
    "file:x.mp4",
    "pipe:0",
    "concat:a|b",
    "subfile,,start,0,end,0,,:x.mp4",
    "img%03d.mp4",
    "img%03d.png",
    "*.mp4",
    "-i.mp4",
    "what?.mp4",
    "a#b.mp4",
    "a\nb.mp4",
    "no suffix",
    "wrong.m3u8",
    "wrong.jpg",
    os.fsdecode(b"caf\xe9.mp4"),
)


@pytest.fixture(scope="module")
def good(tmp_path_factory, make_clip) -> Path:
    return make_clip(tmp_path_factory.mktemp("media") / "good.mp4", seconds=0.4)


@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_any_name_is_opened_as_a_file(tmp_path, monkeypatch, good, name):
    monkeypatch.chdir(tmp_path)
    for neighbour in ("x.mp4", "a", "b", "img001.mp4", "img001.png"):
        Path(neighbour).write_text("not this one")
    shutil.copy(good, name)
    assert len(decode(Clip(Path(name)), num_frames=2).frames) == 2


@pytest.mark.parametrize("name", ["a\nb.mp4", os.fsdecode(b"caf\xe9.mp4"), "a\x1b[31m.mp4"])
def test_a_message_about_any_name_is_one_line_that_can_be_printed(tmp_path, name):
    with pytest.raises(ClipError, match="no such file") as caught:
        decode(Clip(tmp_path / name))
    message = str(caught.value)
    assert message.isprintable() and message.encode("utf-8")


@pytest.fixture
def listener():
    """A server on this machine: its address, and the connections that were made to it."""
    connections = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept():
            while True:
                try:
                    connection, peer = server.accept()
                except OSError:  # the test is over
                    return
                connections.append(peer)
                connection.close()

        thread = threading.Thread(target=accept)
        thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}", connections
        server.shutdown(socket.SHUT_RDWR)
    thread.join()


def test_a_path_that_reads_like_an_address_makes_no_connection(tmp_path, monkeypatch, good, listener):
    address, connections = listener
    monkeypatch.chdir(tmp_path)
    path = Path("http:") / address / "clip.mp4"  # to FFmpeg "http:/host:port/clip.mp4" is an address
    path.parent.mkdir(parents=True)
    shutil.copy(good, path)
    assert decode(Clip(path), num_frames=1).has_video and connections == []


PLAYLIST_TEXTS = {
    "an M3U or HLS playlist": "#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\n{0}\n#EXT-X-ENDLIST\n",
    "an ffconcat list": "ffconcat version 1.0\nfile {0}\n",
    "a PLS playlist": "[playlist]\nFile1={0}\n",
    "an ASF reference file": "[Reference]\nRef1={0}\n",
    "a DASH manifest": '<?xml version="1.0"?>\n<!-- x -->\n<MPD><BaseURL>{0}</BaseURL></MPD>',
    "a Smooth Streaming manifest": '<?xml version="1.0"?><SmoothStreamingMedia Url="{0}"/>',
    "an ASX playlist": '<ASX version="3.0"><entry><ref href="{0}"/></entry></ASX>',
    "a SMIL or WPL playlist": '<?wpl version="1.0"?>\n<smil><media src="{0}"/></smil>',
    "an XSPF playlist": '<?xml version="1.0"?>\n<playlist><location>{0}</location></playlist>',
    "an IMF composition": '<?xml version="1.0"?>\n<CompositionPlaylist><Id>{0}</Id></CompositionPlaylist>',
    "a session description (SDP)": "v=0\r\no=- 0 0 IN IP4 x\r\nc=IN IP4 127.0.0.1\r\nm=video 5004 {0}\r\n",
    "a VobSub index": "# VobSub index file, v7 (do not modify this line!)\nid: en\n",
    "a cue sheet": 'PERFORMER "x"\nFILE "{0}" WAVE\n  TRACK 01 AUDIO\n',
    "an internet shortcut": "[InternetShortcut]\nURL={0}\n",
    "a list of addresses": "http://127.0.0.1/{0}\n",
}


@pytest.mark.parametrize("suffix", [".mp4", ".m3u8", ""])
@pytest.mark.parametrize("kind", PLAYLIST_TEXTS)
def test_a_playlist_is_refused_by_kind_and_what_it_names_is_not_read(tmp_path, good, listener, kind, suffix):
    address, connections = listener
    shutil.copy(good, tmp_path / "inner.mp4")
    for target in ("inner.mp4", f"http://{address}/inner.mp4"):
        path = tmp_path / f"list{suffix}"
        path.write_text(PLAYLIST_TEXTS[kind].format(target))
        with pytest.raises(
            ClipError, match="which refers to media instead of containing them; give the media"
        ) as caught:
            decode(Clip(path))
        assert caught.value.problem == "playlist" and f"is {kind}" in caught.value.detail
    assert connections == []


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("an ffconcat list", "# my clips\nfile 'a.mp4'\nfile 'b.mp4'\n"),
        ("a DASH manifest", '<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a SYSTEM "http://b/c">]><MPD/>'),
        ("a SMIL or WPL playlist", "SMILtext<smil><video src='a.mp4'/></smil>"),
        ("a list of addresses", "# radio\nsmb://server/a.mp4\n"),
        ("a list of addresses", "udp://127.0.0.1:5004"),
    ],
)
def test_a_playlist_is_recognised_without_the_usual_header(tmp_path, kind, text):
    path = tmp_path / "list.mp4"
    path.write_text(text)
    with pytest.raises(ClipError) as caught:
        decode(Clip(path))
    assert f"is {kind}" in caught.value.detail


def test_every_kind_of_playlist_is_tested():
    assert set(PLAYLIST_TEXTS) == set(PLAYLISTS)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_playlist_is_recognised_behind_a_byte_order_mark(tmp_path, encoding):
    path = tmp_path / "list.m3u"
    path.write_text("#EXTM3U\nx.mp4\n", encoding=encoding)
    with pytest.raises(ClipError, match="is an M3U or HLS playlist"):
        decode(Clip(path))


def box(name: bytes, *content: bytes) -> bytes:
    """A box of a QuickTime file."""
    joined = b"".join(content)
    return struct.pack(">I", 8 + len(joined)) + name + joined


def movie(*content: bytes) -> bytes:
    return box(b"ftyp", b"qt  ", bytes(4)) + box(b"mdat", bytes(99)) + box(b"moov", *content)


def track(entry: bytes) -> bytes:
    references = box(b"dref", bytes(4), struct.pack(">I", 1), entry)
    return box(b"trak", box(b"mdia", box(b"minf", box(b"dinf", references))))


@pytest.mark.parametrize(
    "content",
    [
        movie(track(box(b"url ", bytes(4), b"file:///etc/hostname\0"))),
        movie(track(box(b"url ", b"\0\0\0\1")), track(box(b"alis", bytes(200)))),
        movie(box(b"rmra", box(b"rmda", box(b"rdrf", bytes(4), b"url ", b"\0\0\0\5a.mp4")))),
    ],
    ids=["address", "second track", "reference movie"],
)
def test_a_movie_whose_media_lie_in_other_files_is_refused(tmp_path, content):
    path = tmp_path / "reference.mov"
    path.write_bytes(content)
    with pytest.raises(ClipError, match="is a QuickTime reference movie") as caught:
        decode(Clip(path))
    assert caught.value.problem == "playlist"


@pytest.mark.parametrize(
    "text", ["Dear reader, this is no video.\n" * 9, "\x1b[31mred", "<svg/>", ";FFMETADATA1\n"]
)
@pytest.mark.parametrize("suffix", [".mp4", ".txt", ".svg", ".nfo"])
def test_text_is_never_decoded_as_a_picture(tmp_path, text, suffix):
    path = tmp_path / f"text{suffix}"
    path.write_text(text)
    with pytest.raises(ClipError) as caught:
        decode(Clip(path))
    assert caught.value.problem in ("format", "undecodable")


def test_accepted_formats_are_known_to_ffmpeg_and_none_opens_other_files():
    from av import ContainerFormat

    for name in FORMATS:
        ContainerFormat(name, "r")
    others = {"hls", "concat", "sdp", "rtsp", "rtp", "sap", "image2", "lavfi", "vobsub", "tty", "dash", "imf"}
    assert not others & set(FORMATS)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".webp", ".gif", ".tiff"])
def test_a_still_picture_is_a_clip_of_one_frame(tmp_path, face_image, suffix):
    import cv2
    from PIL import Image

    path = tmp_path / f"face_001{suffix}"
    Image.fromarray(cv2.resize(face_image, (96, 64))).save(path)
    raw = decode(Clip(path))
    assert raw.frames.shape == (1, 64, 96, 3) and not raw.has_audio
