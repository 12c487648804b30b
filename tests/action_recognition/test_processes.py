"""Processes that train together: who waits for whom, and that they are at one."""
import time

from recognition_run import by_two_processes

from examples.action_recognition.processes import Processes


def test_the_first_process_of_a_machine_goes_first(tmp_path):
    def work(rank):
        processes = Processes('cpu')
        with processes.first_of_machine():
            if rank == 0:
                time.sleep(.5)
                (tmp_path / 'index').write_text('made once')
            seen = (tmp_path / 'index').read_text()
        processes.close()
        return seen

    assert by_two_processes(work) == ['made once', 'made once']


def test_error_processes_that_see_different_things():
    def work(rank):
        processes = Processes('cpu')
        processes.check_agreed({'videos': 'a'}, 'update and data')  # nothing to say
        processes.check_agreed((rank, {'videos': 'a'}), 'update and data')

    for said in by_two_processes(work):
        assert "ValueError: the processes must have the same update and data, got [(0, {'videos': 'a'})" in said
        assert 'wanted one folder and one list that all of them see' in said
