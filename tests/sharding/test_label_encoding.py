"""Labels become numbers: a class has an index, a finding has a bit."""

from __future__ import annotations

import pytest

from medspark.errors import UsageError
from medspark.sharding.label_encoding import ClassEncoding, FindingsEncoding


def test_findings_are_what_labels_are_joined_of():
    assert FindingsEncoding().names(["b|a", "", "a", "c|a"]) == {"a", "b", "c"}
    assert ClassEncoding().names(["b|a", "a"]) == {"b|a", "a"}


def test_an_image_counts_with_each_of_its_findings_and_one_without_with_none():
    assert FindingsEncoding().by_class({0b000: 5, 0b001: 3, 0b101: 2}, 3) == (5, 0, 2)
    assert ClassEncoding().by_class({0: 5, 2: 2}, 3) == (5, 0, 2)


@pytest.mark.parametrize("count", [1, 32])
def test_more_findings_than_bits_and_a_single_one_are_refused(count):
    with pytest.raises(UsageError, match=f"There are {count} findings, and shards hold 2 to 31"):
        FindingsEncoding().check([str(number) for number in range(count)])
    FindingsEncoding().check([str(number) for number in range(31)])
    ClassEncoding().check([str(number) for number in range(count)])


@pytest.mark.parametrize("encoding", [ClassEncoding(), FindingsEncoding()])
def test_a_class_whose_name_no_figure_can_show_is_refused(encoding):
    encoding.check(["A", "x" * 128])
    with pytest.raises(UsageError, match="129 characters"):
        encoding.check(["A", "x" * 129])


@pytest.mark.spark
def test_a_label_becomes_its_place_among_the_classes_or_a_bit_for_each_finding(spark):
    names = ["b", "a.*", "$x", "label"]
    labels = [*names, "b|label", "a.*|b|$x", "", "other", "other|b"]
    samples = spark.createDataFrame([(label,) for label in labels], "label string")

    def numbers(encoding: ClassEncoding) -> dict[str, int]:
        kept = encoding.kept(samples, names)
        return {
            row["label"]: row["number"]
            for row in kept.withColumn("number", encoding.number(names)).collect()
        }

    assert numbers(ClassEncoding()) == {"b": 0, "a.*": 1, "$x": 2, "label": 3}
    masks = [1, 2, 4, 8, 9, 7, 0, 0, 1]
    assert numbers(FindingsEncoding()) == dict(zip(labels, masks, strict=True))
