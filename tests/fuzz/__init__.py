"""Fuzzing at three levels: what a codec decodes, a session in process, and a gateway on the wire.

Frames are recorded ones (`tests/wire`), bent by grammar (members dropped, renamed, of other types, out of range) and by mutation
(characters and spans flipped, cut, doubled, spliced). Everything is drawn from a seed: the same seed is the same run. What has
failed once is kept in `regressions/` and played again in every run of the tests.

    python -m tests.fuzz --level decode --codec plivo_audio_streaming --count 10000000 --seed 1
    python -m tests.fuzz --level session --count 1000000
    python -m tests.fuzz --level wire --count 1000000 --jobs 2
"""
