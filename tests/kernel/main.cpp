// Runs every test, or those whose promise contains one of the arguments.
#include <cstring>

#include "check.h"

int main(int count, char** arguments) {
  using namespace kernel_tests;
  int passed = 0;
  int failed = 0;
  int skipped = 0;
  for (const Test& test : all_tests()) {
    bool is_selected = count == 1;
    for (int i = 1; i < count; ++i) {
      is_selected = is_selected || std::strstr(test.promise, arguments[i]) != nullptr;
    }
    if (!is_selected) {
      continue;
    }
    outcome() = {};
    test.run();
    if (outcome().failures > 0) {
      ++failed;
      std::printf("FAILED: %s (%d failures)\n", test.promise, outcome().failures);
    } else if (!outcome().skipped.empty()) {
      ++skipped;
      std::printf("SKIPPED: %s: %s\n", test.promise, outcome().skipped.c_str());
    } else {
      ++passed;
      std::printf("passed: %s\n", test.promise);
    }
    std::fflush(stdout);
  }
  std::printf("%d passed, %d failed, %d skipped\n", passed, failed, skipped);
  return failed > 0 ? 1 : 0;
}
