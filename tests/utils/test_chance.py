from lmms_plugin.utils.chance import uniform


def test_values_are_written_in_stone():
    """Which photographs are held out must be the same in the next release, for results to be comparable."""
    assert uniform("0:COCO_train2014_000000581857") == 0.22393909543793425
    assert uniform("1234/part/coco/42") == 0.5119209662839058


def test_values_are_spread_evenly():
    values = [uniform(str(number)) for number in range(20_000)]
    shares = [sum(k / 10 <= value < (k + 1) / 10 for value in values) / 20_000 for k in range(10)]
    assert all(0.09 < share < 0.11 for share in shares)
