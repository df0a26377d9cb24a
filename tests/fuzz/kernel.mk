# Builds the kernel fuzzer; run.sh calls it from the repository's root.
CLANG ?= clang++
FOLDER := build/fuzz/kernel
SANITIZERS := address,undefined
FLAGS := -std=c++17 -O1 -gline-tables-only -Wall -Wextra -Werror -ffp-contract=off -fno-math-errno \
	-fsanitize=fuzzer-no-link,$(SANITIZERS) -fno-sanitize-recover=all -Icsrc -Itests/kernel -Itests/fuzz
SOURCES := $(wildcard csrc/common/*.cpp csrc/cpu/*.cpp) tests/fuzz/kernel_fuzzer.cpp
OBJECTS := $(SOURCES:%.cpp=$(FOLDER)/%.o)

# These four checks precede every memory access and triple the compile time of the instruction sets. AddressSanitizer
# and guard pages catch what the first three do; gcc's sanitizer checks alignment in tests/kernel/run.sh.
$(FOLDER)/csrc/cpu/isa_%.o: FLAGS += -fno-sanitize=null,object-size,pointer-overflow,alignment

$(FOLDER)_fuzzer: $(OBJECTS)
	$(CLANG) -fsanitize=fuzzer,$(SANITIZERS) $^ -o $@

$(FOLDER)/%.o: %.cpp tests/fuzz/kernel.mk
	@mkdir -p $(@D)
	$(CLANG) $(FLAGS) -MMD -MP -c $< -o $@

-include $(OBJECTS:.o=.d)
