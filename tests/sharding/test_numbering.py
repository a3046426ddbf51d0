"""Labels become numbers: of classes one each, of findings a bit each."""

from __future__ import annotations

import pytest

from medspark.errors import UsageError
from medspark.sharding.numbering import Classes, Findings


def test_findings_are_what_labels_are_joined_of():
    assert Findings().names(["b|a", "", "a", "c|a"]) == {"a", "b", "c"}
    assert Classes().names(["b|a", "a"]) == {"b|a", "a"}


def test_an_image_counts_with_each_of_its_findings_and_one_without_with_none():
    assert Findings().by_class({0b000: 5, 0b001: 3, 0b101: 2}, 3) == (5, 0, 2)
    assert Classes().by_class({0: 5, 2: 2}, 3) == (5, 0, 2)


@pytest.mark.parametrize("count", [1, 32])
def test_more_findings_than_bits_and_a_single_one_are_refused(count):
    with pytest.raises(UsageError, match=f"There are {count} findings, and shards hold 2 to 31"):
        Findings().check([str(number) for number in range(count)])
    Findings().check([str(number) for number in range(31)])
    Classes().check([str(number) for number in range(count)])


@pytest.mark.parametrize("numbering", [Classes(), Findings()])
def test_a_class_whose_name_no_figure_can_show_is_refused(numbering):
    numbering.check(["A", "x" * 128])
    with pytest.raises(UsageError, match="129 characters"):
        numbering.check(["A", "x" * 129])


@pytest.mark.spark
def test_a_label_becomes_its_place_among_the_classes_or_a_bit_for_each_finding(spark):
    names = ["b", "a.*", "$x", "label"]
    labels = [*names, "b|label", "a.*|b|$x", "", "other", "other|b"]
    samples = spark.createDataFrame([(label,) for label in labels], "label string")

    def numbers(numbering: Classes) -> dict[str, int]:
        kept = numbering.kept(samples, names)
        return {
            row["label"]: row["number"]
            for row in kept.withColumn("number", numbering.number(names)).collect()
        }

    assert numbers(Classes()) == {"b": 0, "a.*": 1, "$x": 2, "label": 3}
    masks = [1, 2, 4, 8, 9, 7, 0, 0, 1]
    assert numbers(Findings()) == dict(zip(labels, masks, strict=True))
