"""What every model and engine costs, and what it keeps: recall, latency, and the report of both.

The verbs (``vpr bench``, ``vpr search serve``, ``vpr demo``, ``vpr doctor``):

- :mod:`recall`: queries and gallery; ``baselines``, ``variants``, ``paired`` are its parts
- :mod:`latency`: ``backends`` and ``runtimes`` run models, ``ceiling``, ``device_time``, ``fresh_process``,
  ``open_loop``, ``preprocessing`` measure, ``spread`` says how well a time is known
- :mod:`report`: of both; ``report_form`` checks it, ``verdict``, ``columns``, ``charts``, ``sheet``, ``page`` draw it,
  :mod:`compare` compares two
- :mod:`scale`: ``synthetic_gallery`` makes it large
- :mod:`search_page`: ``lookup`` finds, ``http_limits`` bounds what clients get

The stated figures (``make figures``): a module ``figures_TOPIC`` has a topic's parts, each of which is a module.
:mod:`figures` records and draws them, ``command`` reads the flags of those that run on their own.

- teacher: ``ablation``, ``input_pipeline``, ``two_processes``, ``teacher_step``
- student: ``ablation_student``, ``student_sizes``, ``student_dimension``, ``student_epoch``, ``student_step``
- int8: ``int8_tools``, ``int8_study``, ``int8_speed``, ``engines_gpu``, ``fuzz``
- latency: ``independent``, ``recall_check``, ``scale_figures``, ``peers``; the ``other_*`` run by ``apart`` in
  environments of their own
- reliability: ``kills``, ``hostile``, ``guided_fuzz``, ``offline``, ``load``, ``many_threads``, ``soak``

Faults and attacks: ``faults`` runs every stage as a process, ``fault_injection`` does something to it, ``killed_run``
kills it. ``fuzz`` mutates files (``mutated_*``), ``hostile`` makes them (a ``hostile_*`` for each kind of reader);
``*_routes`` have the verbs that are given them, ``*_worker`` is the process that does so, ``case_process`` how it is
asked and watched.
"""
