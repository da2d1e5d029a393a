"""What a visitor may send, through the real gradio client and its queue, against pages whose models are fakes."""

import asyncio
import io
import json
import math
import threading
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import gradio as gr
import httpx
import numpy as np
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

from zoo import spaces
from zoo.errors import UserError
from zoo.spaces import HELD, MAX_IMAGE_BYTES, open_image, page, sentences, serve, upload_row

LARGE = MAX_IMAGE_BYTES + 1


@contextmanager
def served_here(fill: Callable[[], None], store: Path):
    """The URL of a page that fill() fills, served from this process; uploads go to `store`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(store))
        with page("test") as app:
            fill()
        serve(app, wait=False)
        try:
            yield app.local_url.rstrip("/")
        finally:
            app.close()


def stored(folder: Path) -> int:
    """Bytes of the files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def send(url: str, size: int) -> httpx.Response:
    files = {"files": ("picture.png", io.BytesIO(bytes(size)), "image/png")}
    return httpx.post(f"{url}/gradio_api/upload", files=files, timeout=30)


# --------------------------------------------------------------------------------------------------------------- images


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((1_000_000, 1), "1000000 x 1 pixels; at most 16,777,216, and 8192 a side"),
        ((1, 8193), "1 x 8193 pixels"),
        ((5000, 5000), "5000 x 5000 pixels; at most 16,777,216"),
        ((3400, 200), "3400 x 200 pixels; the longer side may be at most 16 times the shorter"),
    ],
)
def test_the_shape_of_an_image_is_bounded_before_a_pixel_is_decoded(tmp_path, monkeypatch, size, message):
    Image.new("1", size).save(tmp_path / "image.png")
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("decoded"))
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        open_image(tmp_path / "image.png")


def test_images_within_the_bounds_are_opened(tmp_path):
    for size in ((1, 1), (1, 16), (3200, 200), (8192, 512)):
        Image.new("1", size).save(tmp_path / "image.png")
        assert open_image(tmp_path / "image.png").size == size
    sideways = Image.Exif()
    sideways[0x0112] = 6  # orientation: turned by a quarter
    Image.new("RGB", (40, 30)).save(tmp_path / "image.jpg", exif=sideways)
    assert open_image(tmp_path / "image.jpg").size == (30, 40)


def test_sixteen_bits_of_grey_keep_their_shades(tmp_path):
    shades = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(shades).save(tmp_path / "image.png")
    assert (np.asarray(open_image(tmp_path / "image.png"))[..., 0] == shades // 256).all()


def test_other_formats_and_damaged_files_are_no_images(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "image.eps")  # PIL would run another program on it
    whole = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(whole, "png")
    (tmp_path / "cut.png").write_bytes(whole.getvalue()[:1500])
    (tmp_path / "empty.png").touch()
    for name in ("image.eps", "cut.png", "empty.png"):
        with pytest.raises(UserError, match="is not an image that can be read"):
            open_image(tmp_path / name)


@pytest.fixture(scope="module")
def picture_page(tmp_path_factory):
    """(URL, folder of uploads, sizes of the images that reached the models)."""
    seen, store = [], tmp_path_factory.mktemp("uploads")

    def answer(image):
        seen.append(image.size)
        return [{"cat": 1.0}, "1 ms"]

    with served_here(lambda: upload_row({"dense": "dense"}, answer), store) as url:
        yield url, store, seen


@pytest.mark.slow
def test_an_image_that_is_too_long_gets_a_sentence_from_a_real_client(picture_page, tmp_path):
    url, _, seen = picture_page
    client = Client(url, verbose=False)
    for size, expected in (((1_000_000, 1), "1000000 x 1 pixels"), ((9000, 1000), "9000 x 1000 pixels")):
        Image.new("1", size).save(tmp_path / "long.png")
        with pytest.raises(AppError, match=expected):
            client.predict(handle_file(tmp_path / "long.png"), api_name="/opened")
    with pytest.raises(AppError, match="Upload an image first"):
        client.predict(None, api_name="/opened")
    assert not seen
    Image.new("RGB", (3000, 2000)).save(tmp_path / "good.png")
    shown, label, seconds = client.predict(handle_file(tmp_path / "good.png"), api_name="/opened")
    assert seen == [(3000, 2000)] and seconds == "1 ms" and label["label"] == "cat"
    assert max(Image.open(shown).size) == spaces.SHOWN_SIDE


def test_large_uploads_are_refused_and_leave_nothing(picture_page):
    url, store, _ = picture_page
    before = stored(store)
    assert send(url, LARGE).status_code == 413
    assert stored(store) == before
    assert send(url, 1000).status_code == 200 and stored(store) == before + 1000


# ---------------------------------------------------------------------------------------------------- words and numbers


@pytest.fixture(scope="module")
def text_page(tmp_path_factory):
    """(URL, folder of uploads) of a page that checks what the ARMOR Space asks for."""
    store = tmp_path_factory.mktemp("uploads")

    def answer(prompt, new_tokens, temperature, seed):
        with sentences():
            temperature = spaces.check_temperature(temperature)
            seed = spaces.check_whole(seed, "Seed", 0, spaces.MAX_SEED)
            return f"{spaces.check_text(prompt)} {spaces.check_new_tokens(new_tokens)} {temperature} {seed}"

    def fill():
        inputs = [gr.Textbox(), gr.Slider(1, 256), gr.Slider(0, 2), gr.Number()]
        gr.Button().click(answer, inputs, gr.Textbox(), preprocess=False)

    with served_here(fill, store) as url:
        yield url, store


def test_a_page_without_a_field_for_files_takes_none(text_page):
    url, store = text_page
    assert send(url, 30 << 20).status_code == 413 and send(url, 1).status_code == 413
    assert stored(store) == 0


GOOD = ("Why?", 64, 0, 0)


def call(url: str, values: tuple) -> tuple[bool, str]:
    """(whether it succeeded, answer or message) of a call with any JSON, NaN and Infinity too."""
    body = json.dumps({"data": list(values)})
    with httpx.Client(base_url=url, timeout=30) as client:
        begun = client.post("/gradio_api/call/answer", content=body, headers={"Content-Type": "application/json"})
        if begun.status_code != 200:
            return False, begun.text
        lines = client.get(f"/gradio_api/call/answer/{begun.json()['event_id']}").text
    data = json.loads(lines.rpartition("data: ")[2])
    return "event: complete" in lines, data[0] if isinstance(data, list) else (data or {}).get("error")


@pytest.mark.parametrize(
    ("place", "values", "sentence"),
    [
        (0, (None, "", "  \n", 7), "The prompt is empty: write one first."),
        (0, ("a" * 2001,), "The prompt has 2001 characters; at most 2000 are allowed."),
        (0, ("a\0b",), "The prompt holds U+0000, which is no text: remove it."),
        (0, ("a\ud800b",), "The prompt holds U+D800, which is no text: remove it."),
        (1, (None, 0, 257, 1.5, "9", math.nan, True, []), "New tokens: a whole number from 1 to 256 is needed."),
        (2, (None, 1e-30, 5e-324, 0.05, -1, 2.1, "hot", {}), "Temperature: 0 (greedy) or 0.1 to 2 is needed."),
        (2, (math.nan, math.inf), "Temperature: 0 (greedy) or 0.1 to 2 is needed."),
        (3, (None, "", -1, 0.5, 2**32, 10**300, math.inf), "Seed: a whole number from 0 to 4294967295 is needed."),
    ],
)
def test_what_cannot_be_asked_gets_a_sentence(text_page, capsys, place, values, sentence):
    url, _ = text_page
    for value in values:
        asked = (*GOOD[:place], value, *GOOD[place + 1 :])
        assert call(url, asked) == (False, sentence), value
    assert "Traceback" not in "".join(capsys.readouterr())


def test_what_can_be_asked_is_answered(text_page):
    url, _ = text_page
    assert call(url, (" Why?\n\tOh ", 256.0, 0.1, 2**32 - 1)) == (True, "Why?\n\tOh 256 0.1 4294967295")
    assert call(url, ("Why?", 1, 0, 0)) == (True, "Why? 1 0.0 0")


# ------------------------------------------------------------------------------------------------------------ the queue


@pytest.mark.slow
def test_a_hundred_visitors_are_held_and_told_their_place_and_the_next_is_refused(tmp_path):
    begun, go_on = threading.Event(), threading.Event()

    def slow(text):
        begun.set()
        go_on.wait(60)
        return text

    def fill():
        gr.Button().click(slow, gr.Textbox(), gr.Textbox(), preprocess=False)

    async def join(client, number):
        body = {"data": [f"{number}"], "fn_index": 0, "session_hash": f"visitor{number}"}
        return await client.post("/gradio_api/queue/join", json=body)

    async def watch(client, number, heard):
        """The places that a visitor was told, in order, and the answer."""
        places = []
        async with client.stream("GET", "/gradio_api/queue/data", params={"session_hash": f"visitor{number}"}) as lines:
            async for line in lines.aiter_lines():
                message = json.loads(line.removeprefix("data: ")) if line.startswith("data: ") else {"msg": ""}
                if message["msg"] == "estimation":
                    places.append((message["rank"], message["queue_size"]))
                    heard.add(number)
                if message["msg"] == "process_completed":
                    return places, message["output"]["data"]
        return places, None

    async def visit(url):
        limits = httpx.Limits(max_connections=HELD + 10)
        async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as client:
            assert (await join(client, 0)).status_code == 200
            await asyncio.to_thread(begun.wait, 30)
            held = [await join(client, number) for number in range(1, HELD + 1)]
            assert {reply.status_code for reply in held} == {200}
            refused = await join(client, HELD + 1)
            assert refused.status_code == 503 and "Queue is full" in refused.json()["detail"]
            heard = set()
            watching = [asyncio.create_task(watch(client, number, heard)) for number in range(HELD + 1)]
            for _ in range(300):
                if len(heard) == HELD + 1:
                    break
                await asyncio.sleep(0.1)
            go_on.set()
            return await asyncio.gather(*watching)

    with served_here(fill, tmp_path) as url:
        seen = asyncio.run(visit(url))
    assert [answer for _, answer in seen] == [[f"{number}"] for number in range(HELD + 1)]
    for number, (places, _) in enumerate(seen[1:]):
        assert places[0] == (number, number + 1), "told the place in line on joining"
        assert [rank for rank, _ in places] == sorted((rank for rank, _ in places), reverse=True)
