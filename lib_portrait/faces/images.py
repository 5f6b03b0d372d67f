"""Photos and masks from the bytes users send. The bytes are hostile until decoded: nothing but PortraitError leaves."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, UnidentifiedImageError

from lib_portrait.errors import PortraitError
from lib_portrait.request import Limits

# What cameras, phones and browsers write. Pillow's other loaders stay shut: some of them start other programs (EPS).
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "HEIF")
MIN_SIDE = 32
MAX_SIDE = 32_000  # OpenCV's warpAffine addresses pixels with 16 bits
GREY = (128, 128, 128)

_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode_image(data: bytes, field: str, limits: Limits) -> np.ndarray:
    """The photo in a file's bytes, upright, (H, W, 3) uint8 RGB.

    EXIF rotation is applied, transparency laid over grey, an animation gives its first frame, 16 bits and CMYK become
    8-bit RGB. Raises PortraitError naming `field` for anything that is no such photo, or outside the limits.
    """
    image = _open(data, field, limits)
    if min(image.size) < MIN_SIDE or max(image.size) > MAX_SIDE:
        raise PortraitError(
            field,
            f"the image is {image.width}x{image.height} pixels",
            f"Use one with sides from {MIN_SIDE} to {MAX_SIDE} pixels.",
        )
    try:
        return np.asarray(_upright(_flatten(image), image))
    except Exception as error:
        raise _damaged(field, error) from error


def decode_mask(data: bytes, field: str, limits: Limits) -> np.ndarray:
    """The mask in a file's bytes, (H, W) float32 in [0, 1].

    With transparency in it, what is opaque belongs to the mask, whatever its colour; otherwise what is white does.
    Raises PortraitError as `decode_image` does, and for a mask that is empty.
    """
    image = _open(data, field, limits)
    try:
        grey = _flatten(image).convert("L")
        if _has_alpha(image):
            alpha = image.convert("RGBA").getchannel("A")
            if np.asarray(alpha).min() < 255:
                grey = alpha
        mask = np.asarray(_upright(grey, image), dtype=np.float32) / 255
    except Exception as error:
        raise _damaged(field, error) from error
    if not mask.any():
        raise PortraitError(field, "the mask is empty", "Paint the region white (or opaque), or leave the mask out.")
    return mask


def _open(data: bytes, field: str, limits: Limits) -> Image.Image:
    """The first frame, decoded, after the sizes of file and picture were held against the limits."""
    if not data:
        raise PortraitError(field, "the file is empty (0 bytes)", "Send the bytes of an image file.")
    if len(data) > limits.photo_bytes:
        raise PortraitError(
            field, f"the file is larger than {limits.photo_bytes // 2**20} MiB", "Use a smaller file of this picture."
        )
    Image.init()
    readable = [name for name in FORMATS if name in Image.OPEN]
    bomb = PortraitError(
        field,
        f"the image has more than {limits.photo_pixels / 1e6:g} million pixels",
        "Scale it down first, or raise the limit in Settings > Portrait.",
    )
    try:
        image = Image.open(io.BytesIO(data), formats=readable)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise bomb from error
    except UnidentifiedImageError as error:
        raise PortraitError(
            field, "it is not an image that can be read", f"Use an undamaged file of type {', '.join(readable)}."
        ) from error
    except Exception as error:
        raise _damaged(field, error) from error
    if image.width * image.height > limits.photo_pixels:
        raise bomb
    try:
        image.load()
    except Exception as error:
        raise _damaged(field, error) from error
    return image


def _damaged(field: str, error: Exception) -> PortraitError:
    # Pillow's decoders answer hostile bytes with nearly every exception there is; all of them mean the same here.
    return PortraitError(
        field,
        f"the image is damaged or incomplete ({type(error).__name__}: {str(error)[:100]})",
        "Open and save it anew in an image editor, or send another file.",
    )


def _has_alpha(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info


def _flatten(image: Image.Image) -> Image.Image:
    """The picture in 8-bit RGB, transparency laid over the grey that also pads photos for the second try."""
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_eight_bits(image)).convert("RGB")
    if not _has_alpha(image):
        return image.convert("RGB")
    ground = Image.new("RGBA", image.size, (*GREY, 255))
    ground.alpha_composite(image.convert("RGBA"))
    return ground.convert("RGB")


def _eight_bits(image: Image.Image) -> np.ndarray:
    """Grey values of 16 or 32 bits, or floating point, as uint8; white is the smallest usual white that holds them."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float32), posinf=0, neginf=0)
    brightest = float(values.max())
    usual = (1.0, 255.0, 65535.0) if image.mode == "F" else (65535.0,)
    white: float = next((white for white in usual if brightest <= white), brightest)
    return (values / white * 255 + 0.5).clip(0, 255).astype(np.uint8)


def _upright(picture: Image.Image, source: Image.Image) -> Image.Image:
    """`picture` turned as the EXIF data of `source` says. Unreadable EXIF turns nothing: the pixels are sound."""
    if source.format == "TIFF":
        return picture  # Pillow has turned it while loading, and up to version 9 leaves the tag in place
    try:
        turn = _UPRIGHT.get(source.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:
        turn = None
    return picture if turn is None else picture.transpose(turn)
