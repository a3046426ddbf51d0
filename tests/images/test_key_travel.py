"""The pseudonym key is sent to executors, or is read there from a file and not sent."""

from __future__ import annotations

import hashlib
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medspark.errors import RunError
from medspark.images.deidentify import Pseudonyms
from medspark.images.resident import ResidentPseudonyms

KEYS = st.binary(max_size=4).map(lambda seed: hashlib.sha256(seed).digest())
KEY = hashlib.sha256(b"key").digest()


def _written(path: Path, key: bytes) -> Path:
    path.write_text(key.hex() + "\n", encoding="ascii")
    path.chmod(0o600)
    return path


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("executor") / "key"


@given(KEYS, st.text(), st.text())
def test_names_are_the_same_where_the_pickle_is_opened(
    there: Path, key: bytes, domain: str, value: str
) -> None:
    _written(there, key)
    for here in (Pseudonyms(key), ResidentPseudonyms(key, file=there)):
        assert pickle.loads(pickle.dumps(here)).name(domain, value) == here.name(domain, value)


@given(KEYS)
def test_a_key_that_the_executors_have_is_not_in_the_pickle_nor_in_its_copys(
    there: Path, key: bytes
) -> None:
    _written(there, key)
    pickled = pickle.dumps(ResidentPseudonyms(key, file=there))

    for sent in (pickled, pickle.dumps(pickle.loads(pickled))):
        assert not any(key[at : at + 8] in sent for at in range(len(key) - 7))
        assert key.hex().encode() not in sent


@given(KEYS, KEYS)
def test_another_key_on_an_executor_is_refused(there: Path, key: bytes, other: bytes) -> None:
    pickled = pickle.dumps(ResidentPseudonyms(key, file=_written(there, other)))
    if key != other:
        with pytest.raises(RunError, match=r"holds another key than the driver's\.$"):
            pickle.loads(pickled)


@pytest.mark.parametrize(
    ("content", "said"), [(None, "cannot be read: No such file"), (b"short", "")]
)
def test_an_executor_without_the_key_says_which_file_is_missing(
    tmp_path: Path, content: bytes | None, said: str
) -> None:
    path = tmp_path / "key"
    pickled = pickle.dumps(ResidentPseudonyms(KEY, file=path))
    if content is not None:
        path.write_bytes(content)
        path.chmod(0o600)

    with pytest.raises(RunError, match=rf"^On the executor \S+: .*{path}.*{said}"):
        pickle.loads(pickled)


def test_a_process_that_never_saw_the_key_reads_it_there(tmp_path: Path) -> None:
    here = ResidentPseudonyms(KEY, file=_written(tmp_path / "key", KEY))
    code = "import pickle, sys; print(pickle.load(sys.stdin.buffer).patient('A'))"

    done = subprocess.run(
        [sys.executable, "-c", code], input=pickle.dumps(here), capture_output=True, check=True
    )

    assert done.stdout.decode().strip() == here.patient("A")
