"""What a stored output may hold: nothing that differs between two runs or two machines."""

import base64
import struct

import nbformat

SIGNATURE = b"\x89PNG\r\n\x1a\n"
STAMPS = (b"tEXt", b"zTXt", b"iTXt", b"tIME")  # matplotlib writes its version into one of these
WIDGET = "application/vnd.jupyter.widget-view+json"  # names a model that dies with the kernel


def without_stamps(png: bytes) -> bytes:
    """The same picture without its text and time chunks."""
    if not png.startswith(SIGNATURE):
        raise ValueError("Not a PNG. The build knows no other picture in image/png. Look at it.")
    kept, at = [SIGNATURE], len(SIGNATURE)
    while at < len(png):
        (length,) = struct.unpack(">I", png[at : at + 4])
        end = at + 12 + length  # length, type, data, checksum
        if png[at + 4 : at + 8] not in STAMPS:
            kept.append(png[at:end])
        at = end
    return b"".join(kept)


def plain(output: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The output without widget views and version stamps; its text and HTML stay as they are."""
    data = output.get("data", {})
    data.pop(WIDGET, None)
    if "image/png" in data:
        picture = without_stamps(base64.b64decode(data["image/png"]))
        data["image/png"] = base64.b64encode(picture).decode()
    return output
