// Makes libraries that are linked on a newer x86-64 Linux run with glibc 2.28 (-DGCAHNG_MANYLINUX=ON).
//
// glibc keeps its old functions under old versions, but the linker takes the newest. For each function that our
// libraries, libstdc++.a or libcudart_static.a call, and that has a version after 2.28, there is a hidden function of
// the same name that jumps to the old one. `auditwheel show` tells when a new one has to be added. Before glibc 2.34
// some of them are not in libc.so.6, but in libraries that torch has loaded before ours.

#include <sys/random.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>

#if !defined(__x86_64__) || !defined(__linux__)
#error "GCAHNG_MANYLINUX is for x86-64 Linux"
#endif

// A section for each, so that the linker leaves out those that nobody calls.
#define OLD(name, version)                                                                                         \
  __asm__(".symver old_" #name ", " #name "@" version "\n.section .text." #name ",\"ax\",@progbits\n.globl " #name \
          "\n.hidden " #name "\n.type " #name ", @function\n" #name ": jmp old_" #name "@PLT\n.size " #name        \
          ", . - " #name "\n.text");

OLD(dlclose, "GLIBC_2.2.5")
OLD(dlerror, "GLIBC_2.2.5")
OLD(dlmopen, "GLIBC_2.3.4")
OLD(dlopen, "GLIBC_2.2.5")
OLD(dlsym, "GLIBC_2.2.5")
OLD(dlvsym, "GLIBC_2.2.5")
OLD(exp, "GLIBC_2.2.5")
OLD(log, "GLIBC_2.2.5")
OLD(pthread_condattr_setpshared, "GLIBC_2.2.5")
OLD(pthread_create, "GLIBC_2.2.5")
OLD(pthread_detach, "GLIBC_2.2.5")
OLD(pthread_getspecific, "GLIBC_2.2.5")
OLD(pthread_join, "GLIBC_2.2.5")
OLD(pthread_key_create, "GLIBC_2.2.5")
OLD(pthread_key_delete, "GLIBC_2.2.5")
OLD(pthread_kill, "GLIBC_2.2.5")
OLD(pthread_mutex_trylock, "GLIBC_2.2.5")
OLD(pthread_mutexattr_destroy, "GLIBC_2.2.5")
OLD(pthread_mutexattr_init, "GLIBC_2.2.5")
OLD(pthread_mutexattr_setpshared, "GLIBC_2.2.5")
OLD(pthread_mutexattr_settype, "GLIBC_2.2.5")
OLD(pthread_once, "GLIBC_2.2.5")
OLD(pthread_rwlock_destroy, "GLIBC_2.2.5")
OLD(pthread_rwlock_init, "GLIBC_2.2.5")
OLD(pthread_rwlock_rdlock, "GLIBC_2.2.5")
OLD(pthread_rwlock_timedrdlock, "GLIBC_2.2.5")
OLD(pthread_rwlock_timedwrlock, "GLIBC_2.2.5")
OLD(pthread_rwlock_tryrdlock, "GLIBC_2.2.5")
OLD(pthread_rwlock_trywrlock, "GLIBC_2.2.5")
OLD(pthread_rwlock_unlock, "GLIBC_2.2.5")
OLD(pthread_rwlock_wrlock, "GLIBC_2.2.5")
OLD(pthread_rwlockattr_destroy, "GLIBC_2.2.5")
OLD(pthread_rwlockattr_init, "GLIBC_2.2.5")
OLD(pthread_rwlockattr_setpshared, "GLIBC_2.2.5")
OLD(pthread_setspecific, "GLIBC_2.2.5")
OLD(pthread_spin_destroy, "GLIBC_2.2.5")
OLD(pthread_spin_init, "GLIBC_2.2.5")
OLD(pthread_spin_lock, "GLIBC_2.2.5")
OLD(pthread_spin_trylock, "GLIBC_2.2.5")
OLD(pthread_spin_unlock, "GLIBC_2.2.5")
OLD(sem_destroy, "GLIBC_2.2.5")
OLD(sem_init, "GLIBC_2.2.5")
OLD(sem_post, "GLIBC_2.2.5")
OLD(sem_timedwait, "GLIBC_2.2.5")
OLD(sem_trywait, "GLIBC_2.2.5")
OLD(sem_wait, "GLIBC_2.2.5")
OLD(shm_open, "GLIBC_2.2.5")
OLD(shm_unlink, "GLIBC_2.2.5")

// What glibc 2.28 lacks. All of it is used by libstdc++.a alone.
#pragma GCC visibility push(hidden)
extern "C" {
char __libc_single_threaded = 0;  // there may be several threads: always a right answer

std::uint32_t arc4random() {
  std::uint32_t number;
  if (getrandom(&number, sizeof number, 0) != sizeof number) std::abort();
  return number;
}

int fstat64(int file, struct stat64* status) { return static_cast<int>(syscall(SYS_fstat, file, status)); }
}
#pragma GCC visibility pop
