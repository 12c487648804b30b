"""Do CME, SME and TIM make a 2D network see motion? Tasks that single frames do not tell, and networks that try them.

``python -m benchmarks.motion`` trains them; ``docs/motion.md`` says what came of it. Where is what:

- the tasks: :mod:`.paths`, :mod:`.scene` and :mod:`.movers`; :mod:`.playback`, :mod:`.ego` and :mod:`.mocap`;
- the networks: :mod:`.rows` and :mod:`.variants`;
- a run: :mod:`.size`, :mod:`.fit`, :mod:`.run` and :mod:`.maps`; all runs: :mod:`.study`;
- what results say: :mod:`.results`, :mod:`.statistics`, :mod:`.tables` and :mod:`.plot`.

Needs the extra [motion].
"""
