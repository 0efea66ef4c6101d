"""What ``--help`` and ``--version`` print. Programs look there for the options that they may use."""

from nbdq import __version__

#: The qemu-nbd whose command line this is.
_TAKEN_FROM = "7.2.0"

VERSION = f"qemu-nbd {_TAKEN_FROM} (nbdq {__version__})\n"

HELP = """\
Usage: qemu-nbd [OPTIONS] FILE
  or:  qemu-nbd -L [OPTIONS]
nbdq, which serves raw and qcow2 images over NBD, with the options of qemu-nbd

  -h, --help                print this
  -V, --version             print the version

Who may connect, and where:
  -p, --port=PORT           TCP port (default 10809)
  -b, --bind=IFACE          address (default 0.0.0.0)
  -k, --socket=PATH         absolute path of a unix socket instead
  -e, --shared=NUM          clients at once, 0 for any number (default 1)
  -t, --persistent          go on when the last client has left
  -x, --export-name=NAME    name of the export (default: empty)
  -D, --description=TEXT    text about the export
  -v, --verbose             accepted
  --handshake-limit=SECS    time for a handshake, 0 for any (default 10)
  --selinux-label=LABEL     not supported

What is shown:
  -f, --format=FORMAT       raw or qcow2
  --image-opts              FILE is a list of options, driver=...,file.filename=...
  -r, --read-only           refuse writes
  -o, --offset=OFFSET       begin OFFSET bytes into the disk
  -A, --allocation-depth    offer the metadata context qemu:allocation-depth
  -B, --bitmap=NAME         offer the metadata context qemu:dirty-bitmap:NAME
  -s, --snapshot            write to a temporary overlay instead of FILE
  -l, --load-snapshot=SNAP  an internal snapshot, read-only: its id or name, or
                            snapshot.id=ID,snapshot.name=NAME
  -n, --nocache             the same as --cache=none
  --cache=MODE              writethrough and directsync make every write durable;
                            none, writeback (default), unsafe: flushes do
  --aio=MODE                accepted: threads, native, io_uring
  --discard=MODE            ignore (default) or unmap
  --detect-zeroes=MODE      off (default), on or unmap

The process:
  --fork                    return when clients can connect
  --pid-file=PATH           write the process id there
  -T, --trace=WORDS         accepted
  -c, --connect=DEV         not supported: use nbd-client
  -d, --disconnect          not supported: use nbd-client

TLS, and other servers:
  --object TYPE,id=ID,...   tls-creds-x509, tls-creds-psk, authz-simple, authz-list, secret
  --tls-creds=ID            use the credentials
  --tls-authz=ID            let in only who is on the list
  --tls-hostname=NAME       with -L: who the server has to be
  -L, --list                print the exports of another server

docs/drop-in.md says what differs from qemu-nbd.
"""
