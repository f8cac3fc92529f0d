"""Image formats that are read, and formats known by the first bytes of a file."""

from functools import cache

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
HEIC_UNREADABLE = "HEIC, which needs pi-heif: run `pip install -r requirements-heic.txt`, or convert it to JPEG"
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_AVIF_BRANDS = (b"avif", b"avis")
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx")


def is_image_content(head: bytes) -> bool:
    """Return whether a file with these first bytes, 32 or more, is an image that can be read here."""
    is_known = head[:3] == b"\xff\xd8\xff" or head[:8] == b"\x89PNG\r\n\x1a\n" or head[:6] in (b"GIF87a", b"GIF89a")
    is_bmp = head[:2] == b"BM" and head[6:10] == bytes(4)
    is_webp = head[:4] == b"RIFF" and head[8:12] == b"WEBP"
    is_tiff_or_avif = head[:4] in _TIFF or _brands(head, _AVIF_BRANDS)
    return is_known or is_bmp or is_webp or is_tiff_or_avif or (is_heic(head) and can_read_heic())


def is_heic(head: bytes) -> bool:
    """Return whether a file with these first bytes, 32 or more, is HEIC, the format of many telephones."""
    return _brands(head, _HEIC_BRANDS) and not _brands(head, _AVIF_BRANDS)


@cache
def can_read_heic() -> bool:
    """Register HEIC with Pillow; return whether pi-heif, the optional package that decodes it, is installed."""
    try:
        import pi_heif
    except ImportError:
        return False
    pi_heif.register_heif_opener(thumbnails=False)
    return True


def formats_of(head: bytes) -> tuple[str, ...]:
    """Return Pillow's names of the formats that a file with these first bytes may have."""
    return ("HEIF",) if is_heic(head) and can_read_heic() else FORMATS


def _brands(head: bytes, brands: tuple[bytes, ...]) -> bool:
    """Return whether an ISO base media file has one of the brands (ISO/IEC 14496-12, 4.3)."""
    if head[4:8] != b"ftyp":
        return False
    return any(head[start : start + 4] in brands for start in (8, *range(16, len(head) - 3, 4)))
