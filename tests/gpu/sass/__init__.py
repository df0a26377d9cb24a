"""An interpreter of SASS, the machine code of NVIDIA GPUs, as cuobjdump prints it.

listing.py parses a disassembly, instructions.py computes what each instruction does, memory.py
holds what it accesses, and machine.py runs blocks and counts. An instruction that the interpreter
does not know raises an error."""
