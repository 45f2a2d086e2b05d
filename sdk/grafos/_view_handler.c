/* The SIGBUS handler of leased memory that is mapped, for x86-64 Linux: see _view.py.
 *
 * It runs in the middle of somebody's access to memory that was cut off. So it takes no lock, calls
 * no library and touches nothing but its table: a fault in one of our views puts zero pages there;
 * any other goes to the handler before us, or is what it would have been without us.
 *
 * The bytes in _view.py are the section .text of
 *   gcc -Os -mno-sse -fPIC -fno-stack-protector -fcf-protection=none \
 *       -fno-asynchronous-unwind-tables -ffreestanding -c _view_handler.c
 */
typedef unsigned long u64; typedef long i64;
struct range { volatile u64 start, length, lost; };
struct table { u64 count; u64 old_handler; struct range ranges[]; };
#define TABLE ((struct table *)0x1122334455667788UL)
static inline i64 call6(i64 n,i64 a,i64 b,i64 c,i64 d,i64 e,i64 f){
 i64 r; register i64 r10 __asm__("r10")=d; register i64 r8 __asm__("r8")=e; register i64 r9 __asm__("r9")=f;
 __asm__ volatile("syscall":"=a"(r):"a"(n),"D"(a),"S"(b),"d"(c),"r"(r10),"r"(r8),"r"(r9):"rcx","r11","memory"); return r; }
struct action { u64 handler, flags, restorer, mask; };
void handler(int number, int *info, void *context) {
  struct table *table = TABLE;
  __asm__ volatile("" : "+r"(table));  /* one place to patch */
  u64 address = *(u64 *)((char *)info + 16);
  if (info[2] > 0)                       /* si_code: a fault of our own, not somebody's kill */
    for (u64 i = 0; i < table->count; i++) {
      struct range *range = &table->ranges[i];
      u64 start = range->start, length = range->length;
      if (start && address - start < length) {
        range->lost = 1;
        if (call6(9, start, length, 3, 0x32, -1, 0) == (i64)start) return;
      }
    }
  if (table->old_handler > 1) {
    ((void (*)(int, int *, void *))table->old_handler)(number, info, context);
    return;
  }
  struct action plain = {0, 0, 0, 0};
  call6(13, number, (i64)&plain, 0, 8, 0, 0);
  if (info[2] <= 0) call6(200, call6(186,0,0,0,0,0,0), number, 0, 0, 0, 0);
}
