"""What holds for every test."""

import signal

# Started in the background of a shell, the tests would inherit an ignored SIGINT and pass it on to the programs they start,
# which could then not be interrupted. A handler is not inherited: with one set here, theirs is the default.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
