def test_it(service):
    assert len(service.embed("hello")) == 384
