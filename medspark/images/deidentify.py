"""De-identify by an allow-list: build the stored row value by value, and copy nothing else.

This follows the basic profile of PS3.15 Annex E with the options 113107 (dates modified, their
order and distance kept) and 113108 (patient characteristics: sex and age). Keyed pseudonyms are
derived from the person's data, so under HIPAA they need expert determination (45 CFR
164.514(b)(1)); Safe Harbor does not cover them.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import logging
import os
import re
import secrets
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field
from pydicom._uid_dict import UID_dictionary
from pydicom.dataset import Dataset

from medspark.config import Config
from medspark.errors import UsageError
from medspark.images.header import clean, coded, numbers, text, texts
from medspark.images.reasons import Reason, Unreadable
from medspark.images.secret import KEY_BYTES, check_readers, check_strength

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESSIV

_LOGGER = logging.getLogger(__name__)

_MADE_BYTES = 32
_OLDEST = 90  # ages above 89 identify (45 CFR 164.514(b)(2)(i)(C))
_MAX_SHIFT = 365  # days


class Privacy(Config):
    """Handling of identifiers in headers and pixels."""

    key_file: Path | None = Field(
        None,
        description="file with the secret key of the pseudonyms, 16 random bytes or more, raw or "
        "hexadecimal, readable by its owner only; by default a key per dataset is created in "
        "~/.medspark/keys of the driver",
    )
    quarantine_file: Path | None = Field(
        None,
        description="private file with the paths of quarantined files, one per dataset and outside "
        "of it; by default in ~/.medspark/quarantine of the driver",
    )
    sites: tuple[str, ...] = Field(
        (),
        description="sites of the label table to store by name, separated by commas; all others "
        "become pseudonyms",
    )
    executor_key_file: Path | None = Field(
        None,
        description="file with the same key on every executor, for example a mounted secret; "
        "without it the driver sends the key, encrypted if Spark's traffic is",
    )
    burned_in: Literal["flagged", "suspected", "ignore"] = Field(
        "flagged",
        description="quarantine images with BurnedInAnnotation YES; 'suspected': also images of "
        "kinds that often show names (ultrasound, secondary capture, scans, screen shots) unless "
        "they say NO",
    )

    def site(self, name: str, pseudonyms: Pseudonyms) -> str:
        """Return the stored form of the site ``name``: the name if allowed, else a pseudonym."""
        return name if name in self.sites else pseudonyms.name("site", clean(name))


class Pseudonyms:
    """Keyed one-way pseudonyms: equal keys give equal pseudonyms on every machine and run."""

    def __init__(self, key: bytes) -> None:
        if len(key) < KEY_BYTES:
            raise UsageError(f"The pseudonym key should have at least {KEY_BYTES} bytes.")
        self._key = key

    def __repr__(self) -> str:
        return "Pseudonyms(key=hidden)"

    @property
    def check(self) -> str:
        """A value that is equal for equal keys and reveals nothing else about them."""
        return self.name("key", "check")

    def name(self, domain: str, value: str) -> str:
        """Return HMAC-SHA256 of ``value`` in ``domain``, cut to 128 bits: 32 hexadecimal digits."""
        return self._digest(domain, value)[:16].hex()

    def patient(self, value: str) -> str:
        """Return the pseudonym of a PatientID, from a header or from a label table."""
        return self.name("patient", clean(value))

    def study(self, value: str) -> str:
        """Return the pseudonym of a StudyInstanceUID."""
        return self.name("study", clean(value))

    def series(self, value: str) -> str:
        """Return the pseudonym of a SeriesInstanceUID."""
        return self.name("series", clean(value))

    def instance(self, value: str) -> str:
        """Return the pseudonym of a SOPInstanceUID."""
        return self.name("instance", clean(value))

    def relative_day(self, patient: str, day: date) -> int:
        """Return ``day`` as a day number, moved by a secret -365 to 365 days per patient.

        Distances between the dates of one patient are kept (PS3.15 option 113107).
        """
        number = int.from_bytes(self._digest("date", clean(patient))[:8], "big")
        return day.toordinal() + number % (2 * _MAX_SHIFT + 1) - _MAX_SHIFT

    def content(self, sha256: str) -> str:
        """Return the keyed digest of a file's SHA-256: it cannot be computed without the key."""
        return self.name("content", sha256)

    def pixels(self, sha256: str) -> str:
        """Return the keyed digest of the SHA-256 of an image's stored values."""
        return self.name("pixels", sha256)

    def seal(self, value: str) -> str:
        """Return ``value`` encrypted with the key (AES-SIV, RFC 5297), in hexadecimal.

        Equal values have equal ciphertexts.
        """
        return _cipher(self._key).encrypt(value.encode("utf-8", "surrogatepass"), None).hex()

    def unseal(self, sealed: str) -> str:
        """Return the value that was sealed. Raises cryptography's InvalidTag for other text."""
        value = _cipher(self._key).decrypt(bytes.fromhex(sealed), None)
        return value.decode("utf-8", "surrogatepass")

    def _digest(self, domain: str, value: str) -> bytes:
        # The domain's length is part of the message, so that two pairs never give one message.
        message = b"%d:%s:%s" % (len(domain), domain.encode(), value.encode("utf-8", "replace"))
        return hmac.digest(self._key, message, "sha256")


@functools.lru_cache(maxsize=1)
def _cipher(key: bytes) -> AESSIV:
    # Only ingest seals values; a device that predicts has no cryptography.
    from cryptography.hazmat.primitives.ciphers.aead import AESSIV

    # A separate derived key, so that sealed values and pseudonyms are unrelated.
    return AESSIV(hmac.digest(key, b"medspark seals", "sha512"))


def load_key(privacy: Privacy, *, dataset: str, new: bool = True) -> bytes:
    """Return the pseudonym key of ``dataset``, creating one if no key file is configured.

    A created key lies in ~/.medspark/keys, outside of every dataset and readable by its owner only.
    Its name is a hash of ``dataset`` (the path or URL of the samples). If the dataset is not
    ``new``, its key must exist. Raises UsageError if the key cannot be read, can be guessed, lies
    inside the dataset, or has permissions that the owner should tighten.
    """
    if privacy.key_file is not None:
        return _read_key(privacy.key_file, dataset=dataset)
    path = private_file(dataset, "keys", ".key")
    if not new and not path.exists():
        raise UsageError(
            f"The pseudonym key of {dataset} is not at {path}: name it with --privacy.key_file, "
            "or write to another folder."
        )
    try:
        return _make_key(path)
    except FileExistsError:
        return _read_key(path, dataset=dataset)
    except OSError as error:
        raise UsageError(
            f"Cannot create a pseudonym key at {path} ({error.strerror}): name a key with "
            "--privacy.key_file."
        ) from None


def private_file(dataset: str, kind: str, suffix: str) -> Path:
    """Return the path of the driver's private file of a ``kind`` for ``dataset``."""
    name = hashlib.sha256(dataset.encode()).hexdigest()[:16]
    return Path.home() / ".medspark" / kind / f"{name}{suffix}"


def _make_key(path: Path) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    key = secrets.token_bytes(_MADE_BYTES)
    # Linked into place when complete, so that a concurrent ingest never reads half a key.
    draft = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(key.hex() + "\n")
    try:
        os.link(draft, path)
    finally:
        draft.unlink()
    _LOGGER.warning(
        "Created a pseudonym key: %s (keep it: it is needed to add to the dataset)", path
    )
    return key


def _read_key(path: Path, *, dataset: str) -> bytes:
    if path.resolve().is_relative_to(Path(dataset).resolve()):
        raise UsageError(f"The pseudonym key {path} should not lie inside the dataset.")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UsageError(f"The pseudonym key {path} cannot be read: {error.strerror}.") from None
    if re.fullmatch(rb"\s*([0-9a-fA-F]{2}){16,}\s*", raw):
        raw = bytes.fromhex(raw.decode())
    check_strength(raw, str(path))
    check_readers(path)
    return raw


# --- the allow-list ---------------------------------------------------------------------------

# Defined terms of Modality (PS3.3 C.7.3.1.1.1) of image objects.
MODALITIES = frozenset((
    "AR", "BI", "BMD", "CR", "CT", "CTPROTOCOL", "DG", "DMS", "DX", "ES", "FID", "GM", "HC",
    "HD", "IO", "IVOCT", "IVUS", "LEN", "LS", "MG", "MR", "NM", "OAM", "OCT", "OP", "OPM",
    "OPT", "OPTBSV", "OPTENF", "OPV", "OT", "PT", "PX", "REG", "RF", "RG", "RTDOSE", "RTIMAGE",
    "SEG", "SM", "SRF", "TG", "US", "VF", "XA", "XC",
))  # fmt: skip
# Defined terms of View Position (PS3.3 C.8.1.2.1.1, C.8.7.1, mammography C.8.11.7.1).
VIEWS = frozenset((
    "AP", "PA", "LL", "RL", "LAT", "RLD", "LLD", "RLO", "LLO", "LATERAL", "CC", "MLO", "ML",
    "LM", "LMO", "FB", "SIO", "XCC", "XCCL", "XCCM", "ISO",
))  # fmt: skip
LATERALITIES = frozenset("RLBU")
SEXES = frozenset("FMO")
# Defined terms of Body Part Examined (PS3.16 Annex L) of projection and section images.
BODY_PARTS = frozenset((
    "ABDOMEN", "ABDOMENPELVIS", "ADRENAL", "ANKLE", "AORTA", "ARM", "AXILLA", "BACK",
    "BILEDUCT", "BLADDER", "BRAIN", "BREAST", "BRONCHUS", "BUTTOCK", "CALCANEUS", "CALF",
    "CAROTID", "CEREBELLUM", "CERVIX", "CHEEK", "CHEST", "CHESTABDOMEN", "CHESTABDPELVIS",
    "CHESTABDOMENPELVIS", "CIRCLEOFWILLIS", "CLAVICLE", "COCCYX", "COLON", "CORNEA",
    "CORONARYARTERY", "CSPINE", "CTSPINE", "DUODENUM", "EAR", "ELBOW", "ESOPHAGUS", "EXTREMITY",
    "EYE", "FACE", "FEMUR", "FINGER", "FOOT", "FOREARM", "GALLBLADDER", "HAND", "HEAD",
    "HEADNECK", "HEART", "HIP", "HUMERUS", "ILEUM", "JAW", "KIDNEY", "KNEE", "LARYNX", "LEG",
    "LIVER", "LSPINE", "LSSPINE", "LUNG", "MANDIBLE", "MAXILLA", "MEDIASTINUM", "NECK",
    "NECKCHEST", "NECKCHESTABDOMEN", "NOSE", "ORBIT", "OVARY", "PANCREAS", "PATELLA", "PELVIS",
    "PENIS", "PHARYNX", "PROSTATE", "RECTUM", "RIB", "SACRUM", "SCALP", "SCAPULA", "SCROTUM",
    "SELLA", "SHOULDER", "SIJOINT", "SKULL", "SPINE", "SPLEEN", "SSPINE", "STERNUM", "STOMACH",
    "SUBMANDIBULAR", "TESTIS", "THIGH", "THUMB", "THYMUS", "THYROID", "TLSPINE", "TMJ", "TOE",
    "TONGUE", "TRACHEA", "TSPINE", "UNKNOWN", "URETER", "URETHRA", "UTERUS", "VAGINA", "VULVA",
    "WHOLEBODY", "WRIST", "ZYGOMA",
))  # fmt: skip
# Parts of the free text of Manufacturer, and the name that is stored instead.
MANUFACTURERS = {
    "SIEMENS": "SIEMENS", "GENERAL ELECTRIC": "GE", "GE MEDICAL": "GE", "GE HEALTHCARE": "GE",
    "GEMS": "GE", "PHILIPS": "PHILIPS", "CANON": "CANON", "TOSHIBA": "CANON", "FUJI": "FUJIFILM",
    "AGFA": "AGFA", "CARESTREAM": "CARESTREAM", "KODAK": "CARESTREAM", "HOLOGIC": "HOLOGIC",
    "LORAD": "HOLOGIC", "SAMSUNG": "SAMSUNG", "HITACHI": "HITACHI", "SHIMADZU": "SHIMADZU",
    "KONICA": "KONICA MINOLTA", "MINDRAY": "MINDRAY", "UNITED IMAGING": "UNITED IMAGING",
    "ALOKA": "HITACHI", "ACUSON": "SIEMENS", "VAREX": "VAREX", "ZEISS": "ZEISS", "TOPCON": "TOPCON",
    "HEIDELBERG": "HEIDELBERG", "SWISSRAY": "SWISSRAY", "DRTECH": "DRTECH", "VIEWORKS": "VIEWORKS",
}  # fmt: skip
PHOTOMETRICS = frozenset((
    "MONOCHROME1", "MONOCHROME2", "RGB", "PALETTE COLOR", "YBR_FULL", "YBR_FULL_422",
    "YBR_PARTIAL_420", "YBR_ICT", "YBR_RCT",
))  # fmt: skip


def kept_attributes(header: Dataset, pseudonyms: Pseudonyms | None) -> dict[str, Any]:
    """Return the allow-listed values of ``header``, as fields of Attributes."""
    row_mm, column_mm, source = _spacing(header)
    kept: dict[str, Any] = {
        "sop_class": _uid(header, "SOPClassUID"),
        "modality": coded(header, "Modality", MODALITIES),
        "body_part": coded(header, "BodyPartExamined", BODY_PARTS),
        "view_position": coded(header, "ViewPosition", VIEWS),
        "laterality": coded(header, "ImageLaterality", LATERALITIES)
        or coded(header, "Laterality", LATERALITIES),
        "manufacturer": _manufacturer(text(header, "Manufacturer")),
        "sex": coded(header, "PatientSex", SEXES),
        "age_years": _age(header),
        "row_spacing_mm": row_mm,
        "column_spacing_mm": column_mm,
        "spacing_source": source,
        "burned_in": coded(header, "BurnedInAnnotation", frozenset(("YES", "NO"))),
    }
    return kept | (_keys(header, pseudonyms) if pseudonyms else {})


def _keys(header: Dataset, pseudonyms: Pseudonyms) -> dict[str, Any]:
    # Without a PatientID, all that is known is that a study belongs to one person. The issuer is
    # ignored: a patient of whom only some files carry it would become two.
    study = text(header, "StudyInstanceUID")
    person = text(header, "PatientID") or study
    taken = _date(text(header, "StudyDate")) or _date(text(header, "AcquisitionDate"))
    series, instance = text(header, "SeriesInstanceUID"), text(header, "SOPInstanceUID")
    return {
        "patient_key": pseudonyms.patient(person) if person else None,
        "study_key": pseudonyms.study(study) if study else None,
        "series_key": pseudonyms.series(series) if series else None,
        "instance_key": pseudonyms.instance(instance) if instance else None,
        "relative_day": pseudonyms.relative_day(person, taken) if person and taken else None,
    }


def check_burned_in(header: Dataset, privacy: Privacy) -> None:
    """Raise Unreadable if the pixels may show the patient's name (PS3.3 C.7.6.1, C.8.6.1)."""
    flag = coded(header, "BurnedInAnnotation", frozenset(("YES", "NO")))
    if privacy.burned_in == "ignore" or flag == "NO":
        return
    if flag == "YES":
        raise Unreadable(Reason.BURNED_IN_ANNOTATION)
    if privacy.burned_in == "suspected" and _often_shows_text(header):
        raise Unreadable(
            Reason.BURNED_IN_ANNOTATION, "a kind of image that often shows the patient's name"
        )


def _often_shows_text(header: Dataset) -> bool:
    kinds = {word.upper() for word in texts(header, "ImageType")}
    return (
        text(header, "Modality").upper() in {"US", "SC", "XC", "OT"}
        or "SECONDARY" in kinds
        or text(header, "ConversionType").upper() in {"WSD", "DV", "DI", "DF", "SD", "SI", "DRW"}
    )


def _uid(header: Dataset, keyword: str) -> str | None:
    value = text(header, keyword)
    return value if value in UID_dictionary else None


def _manufacturer(value: str) -> str | None:
    upper = value.upper()
    if upper == "GE":
        return "GE"
    return next((kept for part, kept in MANUFACTURERS.items() if part in upper), None)


def _age(header: Dataset) -> int | None:
    """Return whole years from PatientAge (VR AS, PS3.5 6.2) or from the dates, 90 at most."""
    match = re.fullmatch(r"(\d{3})([DWMY])", text(header, "PatientAge").upper())
    if match:
        days = {"D": 1.0, "W": 7.0, "M": 30.4375, "Y": 365.25}[match[2]]
        return min(
            int(match[1]) if match[2] == "Y" else int(int(match[1]) * days / 365.25), _OLDEST
        )
    born, taken = _date(text(header, "PatientBirthDate")), _date(text(header, "StudyDate"))
    if born and taken and born <= taken:
        had_birthday = (taken.month, taken.day) >= (born.month, born.day)
        return min(taken.year - born.year - (not had_birthday), _OLDEST)
    return None


def _date(value: str) -> date | None:
    """Return a DA value (PS3.5 6.2; the dotted form of ACR-NEMA included)."""
    match = re.fullmatch(r"(\d{4})\.?(\d{2})\.?(\d{2})", value)
    if not match:
        return None
    try:
        return date(int(match[1]), int(match[2]), int(match[3]))
    except ValueError:
        return None


def _spacing(header: Dataset) -> tuple[float | None, float | None, str | None]:
    """Return row and column spacing in mm, and its source (PS3.3 10.7.1.1, 10.7.1.3)."""
    for keyword in ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing"):
        values = numbers(header, keyword)
        if len(values) == 2 and min(values) > 0:
            return coarse_spacing(values[0]), coarse_spacing(values[1]), keyword
    return None, None, None


def coarse_spacing(millimetres: float) -> float:
    """Return a spacing rounded to three significant digits, which no longer identify one image.

    The error is at most 0.5 %, less than the magnification of projection radiographs. Rendering
    uses the exact pixel aspect from the header.
    """
    return float(f"{millimetres:.3g}")
